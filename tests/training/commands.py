"""Fine-tuning from a command line, for tests."""

import argparse

import mlx.core as mx

from mlx_clex import lora
from mlx_clex.training.option_fields import with_config
from mlx_clex.training.options import TrainingOptions

WORDS = "the quick brown fox jumps over the lazy dog and runs away from it all . "


def argv_for(model, texts, adapters, *more):
    options = f"--batch-size 2 --max-seq-length 32 --num-layers 2 --learning-rate 1e-3 {more[0]}"
    paths = ["--model", str(model), "--data", str(texts), "--adapter-path", str(adapters)]
    return ["--train", *paths, *options.split(), *more[1:]]


def call(argv):
    return lora.main(argv)


def whole_parser():
    parser = argparse.ArgumentParser()
    lora.add_arguments(parser)
    return parser


def parse(*argv):
    return with_config(whole_parser().parse_args(list(argv)), TrainingOptions)


def options(*argv):
    return TrainingOptions.of(parse(*argv))


def arrays(folder):
    names = ("adapters.safetensors", "scaling.safetensors", "norms_embeddings.safetensors")
    return {name: mx.load(str(folder / name)) for name in names if (folder / name).is_file()}


def equal(one, two):
    return one.keys() == two.keys() and all(
        one[name].keys() == two[name].keys()
        and all(mx.array_equal(one[name][key], two[name][key]).item() for key in one[name])
        for name in one
    )
