from __future__ import annotations

import torch

from minifisher_lab.training.augmentation import augmented, crop, recoloured
from minifisher_lab.training.samples import Samples


def test_crop_cuts_windows_of_the_padded_image_and_mirrors_some() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 6, 6)
    cut = crop(image.expand(200, 2, 6, 6), generator, flip=True)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = [padded[:, y : y + 6, x : x + 6] for y in range(9) for x in range(9)]
    mirrored = [window.flip(2) for window in windows]
    found = {index for one in cut for index, w in enumerate(windows + mirrored) if torch.equal(one, w)}
    assert all(any(torch.equal(one, w) for w in windows + mirrored) for one in cut)
    assert len(found) > 60
    assert min(found) < 81 <= max(found)


def test_crop_without_flip_mirrors_nothing() -> None:
    ramp = torch.arange(1.0, 7.0).expand(100, 1, 6, 6)
    cut = crop(ramp, torch.Generator().manual_seed(0), flip=False)
    inside = (cut[..., 1:] > 0) & (cut[..., :-1] > 0)
    assert torch.all((cut.diff(dim=-1) > 0)[inside])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_colours_change_by_one_factor_each_an_image() -> None:
    torch.manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(300, 3, 4, 4)  # nothing is cut: brightness keeps them below 0.75
    brightness, saturation, contrast = torch.rand(3, 300, 1, 1, 1, generator=_generator())
    light = 1 - 63 / 255 + 2 * 63 / 255 * brightness
    grey = (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])[:, None]
    colour, edge = 0.5 + saturation, 0.2 + 1.6 * contrast
    saturated = colour * images + (1 - colour) * grey
    expected = light * (edge * saturated + (1 - edge) * grey.mean((2, 3), keepdim=True))
    found = recoloured(images, _generator())
    inside = (found > 0) & (found < 1)
    assert inside.float().mean() > 0.95
    torch.testing.assert_close(found[inside], expected[inside])


def test_colours_are_changed_before_standardising_and_the_border_is_black() -> None:
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor(0.2)
    images = torch.full((50, 3, 6, 6), 0.5)
    samples = Samples((images - mean) / deviation, torch.zeros(50), mean, deviation)
    changed = augmented(samples.inputs, "crop and colour", samples, _generator()) * deviation + mean
    expected = recoloured(crop(images, generator := _generator(), flip=False, border=2), generator)
    torch.testing.assert_close(changed, expected)
    assert changed.min() >= -1e-6
    assert changed.max() <= 1 + 1e-6
    assert augmented(images, "none", samples, _generator()) is images
