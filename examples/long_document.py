"""Write a document of a chosen length, with one fact in its middle.

    python examples/long_document.py --characters 11500 > document.txt

The text is the debugger's chapter of Python's own help, which every CPython carries. The fact
has nothing to do with it, so an answer that has the word was read from the document.
"""

import argparse
import pydoc_data.topics

FACT = "The secret word of the library is banana. "


def document(characters: int) -> str:
    """Return about `characters` characters (4 are about one token)."""
    text = " ".join(pydoc_data.topics.topics["debugger"].split())
    text = (text * (characters // len(text) + 1))[:characters]
    middle = text.find(". ", characters // 2) + 2
    return f"{text[:middle]}{FACT}{text[middle:]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--characters", type=int, default=11_500, help="length of the text")
    print(document(parser.parse_args().characters))


if __name__ == "__main__":
    main()
