"""Writes text files as token shards in the format of llm.c, for the throughput runs.

    make_token_shards.py PREFIX FILE...   ->  PREFIX_train.bin, PREFIX_val.bin (last tenth)

A token is a word, a run of blanks, or a sign; its id is its rank by frequency, so that ids are spread as
a real tokenizer's are. Ids beyond the vocabulary of GPT-2 become 50255; 50256 ends each file.
"""
import collections
import re
import struct
import sys
from array import array

MAGIC, VERSION, END, UNKNOWN = 20240520, 1, 50256, 50255


def write(path, ids):
    with open(path, "wb") as out:
        out.write(struct.pack("<256i", MAGIC, VERSION, len(ids), *[0] * 253))
        array("H", ids).tofile(out)
    print(path, len(ids), "tokens")


def main(prefix, paths):
    files = []
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as text:
            files.append(re.findall(r"\w+|\s+|[^\w\s]", text.read()))
    counts = collections.Counter(word for words in files for word in words)
    rank = {word: i for i, (word, _) in enumerate(counts.most_common(UNKNOWN))}
    ids = []
    for words in files:
        ids += [rank.get(word, UNKNOWN) for word in words] + [END]
    cut = len(ids) * 9 // 10
    write(prefix + "_train.bin", ids[:cut])
    write(prefix + "_val.bin", ids[cut:])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
