"""Weights of the prompts of an ensemble, found without labels: AutoCLIP for every picture, ZPE for all pictures.

    c[n, k, p] = cos(image n, prompt p of class k),    scale = exp(logit_scale)

AutoCLIP (arXiv 2309.16414, section 3): one step of gradient ascent from equal weights, w = softmax(rho) with rho = 0,

(1)  s_k = sum_p w_p c[n, k, p]
(2)  g_p = d logsumexp_k(s_k) / d rho_p = w_p sum_k softmax_k(s_k) (c[n, k, p] - s_k)
(3)  w_p <- softmax_p(alpha g_p), with the alpha > 0 that lowers the entropy of w to BETA times that of equal weights

ZPE, zero-shot prompt ensembling (arXiv 2302.06235, section 3): how sure each prompt is, over all pictures,

(4)  score_p = mean_n max_k scale (c[n, k, p] - mean_m c[m, k, p])
(5)  w_p = softmax_p(score_p)

Both answer with the direction of the weighted mean, as the plain ensemble does:

(6)  p(k | image n) = softmax_k(scale cos(image n, sum_p w_p prompt[k, p]))

What is verified: (1) to (3) and BETA agree with the simulation that AutoCLIP's authors published
(github.com/boschresearch/autoclip), which takes bare cosines in (1), as here, but classifies by (1) itself; (6) also
divides by the length of the weighted mean, so that equal weights are the plain ensemble. NOT verified against the text
of the paper: (4) and (5). The published score also subtracts a mean over pictures of the pre-training, which are not at
hand, so (4) subtracts this one alone; whether its logits hold the scale, and what stands before the softmax of (5), is
open.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

Weighting = Literal["equal", "autoclip", "zpe"]
CITATIONS = {"autoclip": "AutoCLIP (arXiv 2309.16414)", "zpe": "ZPE (arXiv 2302.06235)"}
BETA = 0.85
"""Share of the entropy of equal weights that AutoCLIP leaves."""
STEEPEST = 1e6
"""Largest alpha times the range of g; where several prompts share the largest g, the entropy may stay above its aim."""
HALVINGS = 45

Images = Float[np.ndarray, "N F"]
Grid = Float[np.ndarray, "K P F"]
Cosines = Float[np.ndarray, "N K P"]
Weights = Float[np.ndarray, "N P"]
Products = Float[np.ndarray, "K P P"]


def cosines_of(image_embeds: Images, prompt_embeds: Grid) -> Cosines:
    """Return c for embeddings of length 1."""
    classes, prompts, features = prompt_embeds.shape
    flat = image_embeds @ prompt_embeds.reshape(-1, features).T
    return flat.reshape(len(image_embeds), classes, prompts)


def softmax(x: Float[np.ndarray, "N M"]) -> Float[np.ndarray, "N M"]:
    """Return exp(x) / sum exp(x) along the last axis."""
    exps = np.exp(x - x.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def autoclip_gradient(cosines: Cosines) -> Weights:
    """Return equation (2) at equal weights."""
    means = cosines.mean(axis=2)
    shares = softmax(means)[..., None]
    return (shares * (cosines - means[..., None])).sum(axis=1) / np.float32(cosines.shape[2])


def entropy(weights: Weights) -> Float[np.ndarray, "N"]:
    """Return -sum w log w."""
    return -(weights * np.log(np.maximum(weights, np.finfo(np.float32).tiny))).sum(axis=1)


def autoclip_weights(cosines: Cosines, beta: float = BETA) -> Weights:
    """Return equation (3), with alpha found by bisection.

    Args:
      cosines: c of some pictures.
      beta: share of the entropy that is left, in (0, 1]; 1 leaves the weights equal.
    """
    gradient = autoclip_gradient(cosines)
    span = np.ptp(gradient, axis=1, keepdims=True)
    # Prompts that all do the same leave nothing to choose from.
    direction = gradient / np.where(span > 0, span, 1)
    aim = np.float32(beta * np.log(gradient.shape[1]))
    low = np.zeros(len(gradient), np.float32)
    high = np.full(len(gradient), STEEPEST, np.float32)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        # The entropy falls as alpha grows.
        above = entropy(softmax(middle[:, None] * direction)) > aim
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return softmax(low[:, None] * direction)


def zpe_weights(image_embeds: Images, prompt_embeds: Grid, logit_scale: float) -> Float[np.ndarray, "P"]:
    """Return equations (4) and (5).

    Args:
      image_embeds: of length 1, of all pictures.
      prompt_embeds: of length 1.
      logit_scale: natural logarithm of what cosines are multiplied by.
    """
    # The mean over pictures is linear, so it is subtracted once, from their embeddings.
    centred = image_embeds - image_embeds.mean(axis=0, keepdims=True)
    step = pictures_at_once(prompt_embeds)
    parts = [cosines_of(centred[i : i + step], prompt_embeds).max(axis=1) for i in range(0, len(centred), step)]
    scores = np.exp(np.float32(logit_scale)) * np.concatenate(parts).mean(axis=0)
    return softmax(scores[None])[0]


def inner_products(prompt_embeds: Grid) -> Products:
    """Return the cosine of every two prompts of a class."""
    return np.einsum("kpf,kqf->kpq", prompt_embeds, prompt_embeds, optimize=True)


def weighted_logits(
    cosines: Cosines, products: Products, weights: Weights, logit_scale: float
) -> Float[np.ndarray, "N K"]:
    """Return the logits of equation (6), each picture with weights of its own.

    Args:
      cosines: c of some pictures.
      products: from `inner_products`.
      weights: of the prompts, for each picture.
      logit_scale: natural logarithm of what cosines are multiplied by.
    """
    along = np.einsum("nkp,np->nk", cosines, weights)
    # |sum_p w_p prompt_p|^2 = sum_pq w_p w_q <prompt_p, prompt_q>: no weighted mean of each picture is ever stored.
    pairs = weights[:, :, None] * weights[:, None, :]
    squares = pairs.reshape(len(weights), -1) @ products.reshape(len(products), -1).T
    return np.exp(np.float32(logit_scale)) * along / np.sqrt(squares)


def pictures_at_once(prompt_embeds: Grid, most: int = 2**24) -> int:
    """Return for how many pictures the cosines, and the weights of every two prompts, are at most `most` numbers."""
    classes, prompts, _ = prompt_embeds.shape
    return max(1, most // (prompts * max(classes, prompts)))
