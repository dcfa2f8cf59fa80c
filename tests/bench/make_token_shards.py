"""Writes text files as token shards in the format of llm.c, for runs on a GPU.

    make_token_shards.py PREFIX FILE...   ->  PREFIX_train.bin, PREFIX_val.bin (last tenth)

Of Python files the docstrings, each text once: English that every machine with Torch has. A token is a word
with the blank before it, a run of blanks, or a sign; its id is its rank by frequency, so that ids are spread
as a real tokenizer's are. Ids beyond the vocabulary of GPT-2 become 50255; 50256 ends each file.
"""
import ast
import collections
import re
import struct
import sys
import warnings
from array import array

MAGIC, VERSION, END, UNKNOWN = 20240520, 1, 50256, 50255
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source):
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [text for node in nodes if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node))]


def texts(paths):
    seen = set()
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        for part in docstrings(text) if path.endswith(".py") else [text]:
            if part not in seen:
                seen.add(part)
                yield part


def write(path, ids):
    with open(path, "wb") as out:
        out.write(struct.pack("<256i", MAGIC, VERSION, len(ids), *[0] * 253))
        array("H", ids).tofile(out)
    print(path, len(ids), "tokens")


def main(prefix, paths):
    warnings.simplefilter("ignore", SyntaxWarning)  # of others' code
    parts = [re.findall(r" ?\w+|\s+(?!\S)|\s|[^\w\s]", text) for text in texts(paths)]
    counts = collections.Counter(word for words in parts for word in words)
    rank = {word: i for i, (word, _) in enumerate(counts.most_common(UNKNOWN))}
    ids = []
    for words in parts:
        ids += [rank.get(word, UNKNOWN) for word in words] + [END]
    cut = len(ids) * 9 // 10
    write(prefix + "_train.bin", ids[:cut])
    write(prefix + "_val.bin", ids[cut:])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
