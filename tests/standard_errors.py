"""The standard error of a noise scale, from the moments of the gradient distribution."""

import numpy as np


def independent(decay, steps):
    """How many independent values have a mean as certain as a bias-corrected moving average."""
    gone = decay**steps
    return (1 + decay) / (1 - decay) * (1 - gone) / (1 + gone)


def of_noise_scale(mean, covariance, tokens, parts, averaged, skew=0.0, kurtosis=0.0):
    r"""Relative standard error of tr S / |G|^2, to first order; both are means of `averaged` estimates.

    For one step of n micro-batches and W tokens, with the estimates S of the trace and A of |G|^2 that
    `_estimates` returns::

        Var S = 2 tr C^2 / (n - 1) + k / W
        Var A = 4 G'CG / W + 2 n tr C^2 / ((n - 1) W^2)
        Cov(S, A) = 2 s / W - 2 tr C^2 / ((n - 1) W)

    This holds for micro-batches of any sizes if gradients are normal, and for equal sizes otherwise.
    Then s is the mean of (G'x) |x|^2, and k the variance of |x|^2 minus 2 tr C^2, where x = g - G
    for a token.

    Args:
      mean: G. In a norm P this is P^(1/2) G, and the covariance P^(1/2) C P^(1/2).
      covariance: C, the covariance of the gradient of one token.
      tokens: W.
      parts: n.
      averaged: the number of independent steps; for a moving average, use `independent`.
      skew: s.
      kurtosis: k.
    """
    trace, fourth = np.trace(covariance), np.sum(covariance**2)
    ratio = trace / np.sum(mean**2)
    of_trace = 2 * fourth / (parts - 1) + kurtosis / tokens
    of_square = 4 * mean @ covariance @ mean / tokens
    of_square += 2 * fourth * parts / ((parts - 1) * tokens**2)
    of_both = 2 * skew / tokens - 2 * fourth / ((parts - 1) * tokens)
    variance = of_trace + ratio**2 * of_square - 2 * ratio * of_both
    return np.sqrt(variance / averaged) / trace
