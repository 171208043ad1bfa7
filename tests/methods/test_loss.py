"""The loss of reconstruction."""

import torch

from hdrq.methods.loss import reconstruction_loss


def test_loss_sums_channels_and_averages_the_rest():
    images, tokens = torch.zeros(2, 5, 3, 3), torch.zeros(2, 7, 5)
    assert reconstruction_loss(images, images + 2) == reconstruction_loss(tokens, tokens + 2) == 20
    assert reconstruction_loss(torch.zeros(2, 5), torch.full((2, 5), 2.0)) == 20
