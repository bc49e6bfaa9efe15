"""The layers of SEA's decoders for one item, channels first: [C, T, columns]."""

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


def linear(x, weight, bias):
    return x @ weight.T + bias


def layer_norm(x, weight, bias):
    """Over the last axis, eps 1e-5."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + x.dtype.type(1e-5)) * weight + bias


def gelu(x):
    return x * (x.dtype.type(0.5) * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def convolution(x, weight, bias, stride=1, dilation=1, before=1, after=1):
    """out[o,t,c] = bias_o + sum_{i,a,e} weight[o,i,a,e] x[i, stride t - before + dilation a, c + dilation (e - 1)].

    x is 0 outside, and has `before` and `after` such rows in time; the rows of out are those with all taps inside.
    """
    channels, _, width = x.shape
    side = np.zeros((channels, before, width), x.dtype), np.zeros((channels, after, width), x.dtype)
    padded = np.pad(np.concatenate([side[0], x, side[1]], axis=1), ((0, 0), (0, 0), (dilation, dilation)))
    rows = range(0, padded.shape[1] - 2 * dilation, stride)
    out = np.zeros((len(weight), len(rows), width), x.dtype) + bias[:, None, None]
    for a in range(3):
        for e in range(3):
            taken = padded[:, [row + dilation * a for row in rows], dilation * e : dilation * e + width]
            out = out + np.einsum("oi,itc->otc", weight[:, :, a, e], taken)
    return out


def area_resize(x, size):
    """The last axis to `size`: column j is the mean of [floor(j W / size), ceil((j + 1) W / size))."""
    width = x.shape[-1]
    edges = [(j * width // size, -(-(j + 1) * width // size)) for j in range(size)]
    return np.stack([x[..., low:high].mean(axis=-1) for low, high in edges], axis=-1)


def bilinear_resize(x, size, axis):
    """Half-pixel centres: out_j is x at (j + 1/2) L / size - 1/2, never below 0, between its two neighbours."""
    length = x.shape[axis]
    twice = np.maximum((2 * np.arange(size) + 1) * length - size, 0)  # 2 size times the place
    low = twice // (2 * size)
    fraction = ((twice % (2 * size)) / (2 * size)).astype(x.dtype)
    fraction = fraction.reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    high = np.minimum(low + 1, length - 1)
    return np.take(x, low, axis) * (1 - fraction) + np.take(x, high, axis) * fraction
