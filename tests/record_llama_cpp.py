"""Records what llama.cpp's penalties and DRY make of logits, for test_history_engines.py.

    python tests/record_llama_cpp.py LIBRARY BUILD [CASES] > tests/llama_cpp.json

LIBRARY is one that has llama.cpp's functions, such as the module of the package xllamacpp; BUILD
names it. Needs no more than Python's standard library.
"""

import ctypes as c
import json
import random
import sys

V = 12


class Token(c.Structure):
    _fields_ = (("id", c.c_int32), ("logit", c.c_float), ("p", c.c_float))


class Tokens(c.Structure):
    _fields_ = (
        ("data", c.POINTER(Token)),
        ("size", c.c_size_t),
        ("selected", c.c_int64),
        ("sorted", c.c_bool),
    )


class Vector(c.Structure):
    """libstdc++'s std::vector."""

    _fields_ = (("begin", c.c_void_p), ("end", c.c_void_p), ("room", c.c_void_p))

    @classmethod
    def of(cls, array):
        begin = c.addressof(array)
        made = cls(begin, begin + c.sizeof(array), begin + c.sizeof(array))
        made.keeps = array
        return made


def library(path):
    made = c.CDLL(path)
    made.llama_sampler_init_penalties.restype = c.c_void_p
    made.llama_sampler_init_penalties.argtypes = [c.c_int32, c.c_int32, *[c.c_float] * 3]
    # llama_sampler_init_dry_testing(float, float, int, int, const std::vector<std::vector<int>>&)
    made.dry = made._Z30llama_sampler_init_dry_testingffiiRKSt6vectorIS_IiSaIiEESaIS1_EE
    made.dry.restype = c.c_void_p
    made.dry.argtypes = [c.c_float, c.c_float, c.c_int32, c.c_int32, c.c_void_p]
    made.llama_sampler_accept.argtypes = [c.c_void_p, c.c_int32]
    made.llama_sampler_apply.argtypes = [c.c_void_p, c.POINTER(Tokens)]
    made.llama_sampler_free.argtypes = [c.c_void_p]
    return made


def float32(x):
    return c.c_float(x).value


def run(llama, sampler, tokens, logits):
    for token in tokens:
        llama.llama_sampler_accept(sampler, token)
    data = (Token * V)(*[Token(i, x, 0.0) for i, x in enumerate(logits)])
    array = Tokens(data, V, -1, False)
    llama.llama_sampler_apply(sampler, c.byref(array))
    llama.llama_sampler_free(sampler)
    return [x for _, x in sorted((one.id, one.logit) for one in data)]


def case(llama, draw, kind):
    kinds = draw.choice([3, V] if kind == "penalties" else [2, 3, 5])
    tokens = [draw.randrange(kinds) for _ in range(draw.randrange(0, 40))]
    if tokens and draw.random() < 0.7:  # the text ends with a repeat
        at = draw.randrange(len(tokens))
        tokens += tokens[at : at + draw.randrange(2, 20)]
    logits = [float32(draw.gauss(0, 3)) for _ in range(V)]
    window = draw.choice([3, 8, 64, 64])
    if kind == "penalties":
        numbers = {
            "repetition": float32(draw.choice([1.0, 1.1, 1.3, 0.9])),
            "frequency": float32(draw.choice([0.0, 0.1, -0.3])),
            "presence": float32(draw.choice([0.0, 0.7, -0.2])),
        }
        sampler = llama.llama_sampler_init_penalties(V, window, *numbers.values())
    else:
        numbers = {
            "multiplier": float32(draw.choice([0.8, 1.0, 3.3])),
            "base": float32(draw.choice([1.75, 1.1, 1.0, 40.0])),
            "allowed_length": draw.choice([1, 2, 2, 3, 5]),
            "breakers": sorted(draw.sample(range(V), draw.choice([0, 1, 2]))),
        }
        vectors = [Vector.of((c.c_int32 * 1)(i)) for i in numbers["breakers"]]
        breakers = Vector.of((Vector * len(vectors))(*vectors))
        *first, _ = numbers.values()
        sampler = llama.dry(*first, window, c.addressof(breakers))
    out = run(llama, sampler, tokens, logits)
    return {"tokens": tokens, "window": window, "numbers": numbers, "logits": logits, "out": out}


def main(path, build, cases="60"):
    llama, draw = library(path), random.Random(0)
    kinds = ("penalties", "dry")
    record = {k: [case(llama, draw, k) for _ in range(int(cases))] for k in kinds}
    lists = [
        f"{json.dumps(kind)}: [\n" + ",\n".join(map(json.dumps, cases)) + "\n]"
        for kind, cases in record.items()
    ]
    sys.stdout.write(",\n".join([f'{{"build": {json.dumps(build)}', *lists]) + "}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
