"""Write a document of a chosen length, with one fact in its middle.

    python examples/long_document.py --characters 11500 > document.txt

The text is the chapter on the debugger from Python's help, which is part of CPython. The fact is
unrelated to it, so a model that answers with the word has read it in the document.
"""

import argparse
import pydoc_data.topics

FACT = "The secret word of the library is banana. "


def document(characters: int) -> str:
    """Return a text of about `characters` characters (about 4 a token) with the fact."""
    text = " ".join(pydoc_data.topics.topics["debugger"].split())
    text = (text * (characters // len(text) + 1))[:characters]
    # Behind the first sentence after the middle, or after all where none ends there.
    before, end, after = text[characters // 2 :].partition(". ")
    return f"{text[: characters // 2]}{before}{end or ' '}{FACT}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--characters", type=int, default=11_500, help="length of the text")
    print(document(parser.parse_args().characters))


if __name__ == "__main__":
    main()
