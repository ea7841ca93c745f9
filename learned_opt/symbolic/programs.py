"""Programs that are known by name: where searches start, and what they are measured against."""

from learned_opt.symbolic.program import Program, parse

ADAMW = """\
def train(w, g, m, v, lr):
    g2 = square(g)
    m = interpolate(g, m, 0.9)
    v = interpolate(g2, v, 0.999)
    sqrt_v = sqrt(v)
    update = m / sqrt_v
    wd = w * 0.01
    update = update + wd
    lr = lr * 0.001
    update = update * lr
    return update, m, v
"""
"""AdamW without bias correction and epsilon, where arXiv 2302.06675 starts its searches."""

LION = """\
def train(w, g, m, v, lr):
    c = interpolate(g, m, 0.9)
    update = sign(c)
    m = interpolate(g, m, 0.99)
    wd = w * 0.01
    update = update + wd
    lr = lr * 0.0003
    update = update * lr
    return update, m, v
"""

LION_AS_FOUND = """\
def train(w, g, m, v, lr):
    g = clip_by_global_norm(g, lr)
    g = arcsin(g)
    m = interpolate(g, v, 0.899)
    m2 = m * m
    v = interpolate(g, m, 1.109)
    abs_m = sqrt(m2)
    update = m / abs_m
    wd = w * 0.4602
    update = update + wd
    lr = lr * 0.0002
    m = cosh(update)
    update = update * lr
    return update, m, v
"""
"""The program that became Lion, without what is redundant (arXiv 2302.06675)."""

SGD = """\
def train(w, g, m, v, lr):
    m = interpolate(g, m, 0.9)
    lr = lr * 0.1
    update = m * lr
    return update, m, v
"""

PROGRAMS: dict[str, Program] = {
    "adamw": parse(ADAMW, "adamw"),
    "lion": parse(LION, "lion"),
    "lion_as_found": parse(LION_AS_FOUND, "lion_as_found"),
    "sgd_momentum": parse(SGD, "sgd_momentum"),
}
