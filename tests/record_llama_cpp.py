"""Records what llama.cpp's penalties, DRY and filters make of logits, for tests of engines.

    python tests/record_llama_cpp.py LIBRARY BUILD [CASES] > tests/llama_cpp.json

LIBRARY is one that has llama.cpp's functions, such as the module of the package xllamacpp; BUILD
names it. Needs no more than Python's standard library.
"""

import ctypes as c
import json
import random
import sys

V = 12
# The filters that llama.cpp has, in the order of its own chain, with the knobs that are drawn.
FILTERS = {
    "top_n_sigma": [0.5, 1.0, 2.1],  # of two tokens, 2.0 is at the edge
    "top_k": [1, 5, 20],
    "typical_p": [0.3, 0.9],
    "top_p": [0.5, 0.9, 0.99],
    "min_p": [0.05, 0.3],
    "xtc_threshold": [0.02, 0.1, 0.3],
}


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
    for name, *kinds in (
        ("top_n_sigma", c.c_float),
        ("top_k", c.c_int32),
        ("typical", c.c_float, c.c_size_t),
        ("top_p", c.c_float, c.c_size_t),
        ("min_p", c.c_float, c.c_size_t),
        ("xtc", c.c_float, c.c_float, c.c_size_t, c.c_uint32),
        ("temp", c.c_float),
    ):
        init = getattr(made, f"llama_sampler_init_{name}")
        init.restype, init.argtypes = c.c_void_p, kinds
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


def filtered(llama, draw):
    """A random chain of llama.cpp's filters, in any order and its temperature last."""
    names = draw.sample(list(FILTERS), draw.choice([1, 1, 2, 3, 4]))
    if "top_n_sigma" in names and "typical_p" in names:
        names.remove("typical_p")  # there, its entropy is NaN with the tokens of p = 0 this leaves
    numbers = {name: draw.choice(FILTERS[name]) for name in names}
    # two filters of llama.cpp have no minimum of tokens
    keep = 1 if {"top_n_sigma", "top_k"} & set(names) else draw.choice([1, 1, 3])
    temperature = draw.choice([1.0, 0.7, 1.5])
    logits = [float32(draw.gauss(0, 2)) for _ in range(4 * V)]
    data = (Token * len(logits))(*[Token(i, x, 0.0) for i, x in enumerate(logits)])
    array = Tokens(data, len(logits), -1, False)
    for name in [*names, "temp"]:
        init = getattr(llama, "llama_sampler_init_" + {
            "typical_p": "typical", "xtc_threshold": "xtc"
        }.get(name, name))  # fmt: skip
        given = [temperature if name == "temp" else numbers[name]]
        if name == "xtc_threshold":
            given = [1.0, *given, keep, 0]
        elif name in ("typical_p", "top_p", "min_p"):
            given.append(keep)
        sampler = init(*given)
        llama.llama_sampler_apply(sampler, c.byref(array))
        llama.llama_sampler_free(sampler)
    left = [array.data[i] for i in range(array.size)]
    out = {one.id: one.logit for one in left if one.logit > -float("inf")}
    case = {"numbers": numbers, "keep": keep, "temperature": temperature, "logits": logits}
    return case | {"out": dict(sorted(out.items()))}


def main(path, build, cases="60"):
    llama, draw = library(path), random.Random(0)
    kinds = ("penalties", "dry")
    record = {k: [case(llama, draw, k) for _ in range(int(cases))] for k in kinds}
    record["filters"] = [filtered(llama, draw) for _ in range(2 * int(cases))]
    lists = [
        f"{json.dumps(kind)}: [\n" + ",\n".join(map(json.dumps, cases)) + "\n]"
        for kind, cases in record.items()
    ]
    sys.stdout.write(",\n".join([f'{{"build": {json.dumps(build)}', *lists]) + "}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
