from typing import Any


def frozen_config(config, scaling, scale, program):
    raise NotImplementedError
