"""Networks: shapes, settings, sentences."""

import pytest
import torch

from tfkd_ray.models import Cnn, Mlp, Network


@pytest.mark.parametrize("network", [Mlp(), Mlp(hidden=()), Mlp(hidden=(8, 8), dropout=0.5), Cnn(), Cnn(widths=(4,))])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_networks_map_images_to_logits(network: Network, shape: tuple[int, int, int]) -> None:
    assert network.build(shape, 7)(torch.randn(2, *shape)).shape == (2, 7)


def test_parameters_are_counted_by_hand() -> None:
    def count(network: Network) -> int:
        return sum(p.numel() for p in network.build((1, 8, 8), 10).parameters())

    assert count(Mlp(hidden=(64,))) == 64 * 64 + 64 + 64 * 10 + 10
    assert count(Cnn(widths=(16, 32))) == 16 * 9 + 2 * 16 + 32 * 16 * 9 + 2 * 32 + 32 * 10 + 10


def test_too_many_stages_for_a_small_image_are_refused() -> None:
    with pytest.raises(ValueError, match="widths: 5 stages halve a 8x8 image to nothing"):
        Cnn(widths=(1, 1, 1, 1, 1)).build((1, 8, 8), 10)
