"""Count words in the documentation and licences that are installed with Python.

The classic of data-parallel computing, with ``dask.bag``: every partition of texts is split into
words and counted where it is (map), and the counts are merged in a tree (fold). The longest line
is found in the same run by a fold with a function of our own.

Text fits functions on demand well: it needs much work in Python for each byte, and partitions
know nothing of each other. A Lambda function cannot see the files of this computer, so they are
read here and travel with the graph; a bag over objects in S3 would read them in its tasks.

Run it with ``python wordcount.py``.
"""

import heapq
import re
import sys
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import dask
import dask.bag as db

from dask_lambda import lambda_get, last_report

PARTITIONS = 40
TOP = 10


def installed_texts() -> list[str]:
    """The language reference of Python's help(), and the readable files of installed packages.

    Each text appears once, however many packages ship it; no two installations have the same.
    """
    try:
        from pydoc_data.topics import topics  # some Linux distributions package it separately
    except ImportError:
        topics = {}
    texts = list(topics.values())
    for distribution in distributions():
        for file in distribution.files or []:
            named = re.match(r"(licen[cs]e|copying|notice|authors|readme)", file.name, re.I)
            if file.suffix in {".md", ".rst"} or (named and file.suffix in {"", ".txt"}):
                path = Path(file.locate())
                if path.is_file():
                    texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return sorted(set(texts))


def words_of(line: str) -> list[str]:
    """Split a line into words of English, in lower case."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", line.lower())


def by_count(word_and_count: tuple[str, int]) -> tuple[int, str]:
    """Sort key: by count, and by the word itself among equals, so that the order is unique."""
    word, count = word_and_count
    return count, word


def longer(line: str, other: str) -> str:
    """The longer line; of two equally long ones the later in the alphabet."""
    return max(line, other, key=lambda text: (len(text), text))


def main() -> None:
    """Count the words, find the longest line and compare with a Counter and a loop."""
    texts = installed_texts()
    if not texts:
        sys.exit("there is no text to count: this installation of Python came without any")

    lines = db.from_sequence(texts, npartitions=PARTITIONS).map(str.splitlines).flatten()
    words = lines.map(words_of).flatten()
    top = words.frequencies().topk(TOP, key=by_count)
    longest = lines.fold(longer, initial="")

    top, total, longest = dask.compute(top, words.count(), longest, scheduler=lambda_get)

    print(f"{total} words in {len(texts)} texts; the {TOP} most frequent:")
    for word, count in top:
        print(f"  {count:7} {word}")
    print(f"the longest line has {len(longest)} characters: {longest.strip()[:50]!r} ...")

    plain_lines = [line for text in texts for line in text.splitlines()]
    plain = Counter(word for line in plain_lines for word in words_of(line))
    if top != heapq.nlargest(TOP, plain.items(), key=by_count) or total != plain.total():
        sys.exit("check failed: collections.Counter counts other words")
    if longest != max(plain_lines, key=lambda text: (len(text), text)):
        sys.exit("check failed: a plain loop finds another longest line")
    print("check passed: collections.Counter has the same words and counts, a loop the same line")
    print(last_report())


if __name__ == "__main__":
    main()
