"""Linear attention as matrices of all pairs of tokens, in float64 numpy: what the fast forms are
held to. Everything is [B, T, H, D], weights are [B, H, T, T].
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def relu(x):
    return np.maximum(x, 0)


def unit_silu(x):
    y = x * sigmoid(x) + 0.5
    return y / np.sqrt((y**2).sum(-1, keepdims=True))


def norm_aware(q, k):
    n = np.sqrt((q**2).sum(-1, keepdims=True))
    p = 3 * (0.5 + np.tanh(n))
    phi_q = np.concatenate([relu(q / n) ** p, relu(-q / n) ** p], -1)
    return phi_q, np.concatenate([relu(k**3), relu(-(k**3))], -1)


def products(q, k):
    return np.einsum("bihd,bjhd->bhij", q, k)


def applied(weights, v):
    return np.einsum("bhij,bjhv->bihv", weights, v)


def by_sum(a):
    return a / a.sum(-1, keepdims=True)


def mala(a, b=None):
    """a: scores over n, from which z is made; b: those of the values, if they are others."""
    z = a.sum(-1, keepdims=True)
    return (a if b is None else b) * (1 + 1 / z) - z / a.shape[-1]


def inline(a):
    return a - a.sum(-1, keepdims=True) / a.shape[-1] + 1 / a.shape[-1]


def lion_mask(log_decay):
    """[B, T, H] -> [B, H, T, T]: the product of decays over min + 1 ... max."""
    c = np.moveaxis(np.cumsum(log_decay, 1), 1, 2)
    return np.exp(-np.abs(c[..., :, None] - c[..., None, :]))


def vig(q, k, v, forward, backward):
    """The mean of two recurrences, token by token."""
    B, T, H, K = q.shape
    total = np.zeros((*q.shape[:3], v.shape[-1]))
    for decay, tokens in ((forward, range(T)), (backward, range(T - 1, -1, -1))):
        state = np.zeros((B, H, K, v.shape[-1]))
        for t in tokens:
            state = np.exp(decay[:, t])[..., None] * state
            state = state + k[:, t][..., None] * v[:, t][..., None, :]
            total[:, t] += np.einsum("bhk,bhkv->bhv", q[:, t], state) / 2
    return total * K**-0.5


def rotated(x, angles):
    """Neighboring channels rotated by angles [T, D / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def manhattan(q, k, v, log_decay, grid, window=None, shift=0):
    """[B, T, H, D]: the weights of all pairs of places, a product of a column's and a row's."""
    height, width = grid
    y, x = np.divmod(np.arange(height * width), width)

    def group(place, size):
        """Which window a place is in, moved by the shift; what wraps around is one of its own."""
        if window is None or window >= size:
            return np.zeros_like(place)
        moved = (place - shift) % size
        return 2 * (moved // window) + (moved >= size - shift)

    gy, gx = group(y, height), group(x, width)
    s = products(q, k) * q.shape[-1] ** -0.5
    same_row = (y[:, None] == y) & (gx[:, None] == gx)
    same_column = (x[:, None] == x) & (gy[:, None] == gy)
    decay = log_decay[:, None, None]

    # Windows are over moved places, so distances are as well.
    def distance(place):
        return np.abs(place[:, None] - place)

    rows = softmax(np.where(same_row, s + decay * distance(x), -np.inf))
    columns = softmax(np.where(same_column, s + decay * distance(y), -np.inf))
    return applied(columns @ rows, v)


def depthwise(x, kernel, grid):
    """x [B, T, F], kernel [B or 1, W, F]; place by place."""
    size = len(kernel[0])
    y = np.zeros_like(x)
    if not grid:
        for t in range(x.shape[1]):
            for w in range(size):
                s = t + w - size // 2
                if 0 <= s < x.shape[1]:
                    y[:, t] += kernel[:, w] * x[:, s]
        return y
    side = round(size**0.5)
    before = x.shape[1] - grid[0] * grid[1]
    for row in range(grid[0]):
        for column in range(grid[1]):
            for w in range(size):
                r, c = row + w // side - side // 2, column + w % side - side // 2
                if 0 <= r < grid[0] and 0 <= c < grid[1]:
                    t, s = before + row * grid[1] + column, before + r * grid[1] + c
                    y[:, t] += kernel[:, w] * x[:, s]
    return y
