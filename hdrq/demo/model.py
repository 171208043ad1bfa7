"""The demo's network: a small BatchNorm ResNet (He et al. 2016), and its trained weights."""

from pathlib import Path

from torch import Tensor, nn

from hdrq.checkpoint.library import load_file
from hdrq.demo.data import TARGETS

NAMES = ("source", *TARGETS)
WEIGHTS = Path(__file__).parent / "weights"


class ResidualBlock(nn.Module):
    """`relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`: (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        if stride == 1 and channels_in == channels_out:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages of two residual blocks, global average pool, linear head: (N, 3, 32, 32) to (N, 10)."""

    def __init__(self, channels: tuple[int, int, int] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        first, second, third = channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(first, first),
            ResidualBlock(first, first),
            ResidualBlock(first, second, stride=2),
            ResidualBlock(second, second),
            ResidualBlock(second, third, stride=2),
            ResidualBlock(third, third),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(third, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the head classifies: (N, 3, 32, 32) to (N, 64)."""
        return self.pool(self.blocks(self.stem(x))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def resnet() -> ResNet:
    """A freshly initialised network with 16, 32 and 64 channels: about 175,000 parameters."""
    return ResNet()


def load_model(name: str) -> ResNet:
    """The trained network "source", or the one adapted to "mnist", "optdigits" or "photos", in evaluation mode."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    model = resnet()
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()
