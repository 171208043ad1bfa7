"""Families of models from timm and transformers, small and with random weights: which of them hdrq quantizes.

``python tests/sweep.py`` runs all of them, ``python tests/sweep.py timm/resnet18 BertModel`` some; both libraries must
be installed. torchvision, which timm imports and its models do not run, is a stub where it is missing. Each model goes
through round to nearest and through a few steps of the loop, whose losses must be those of the model that comes out. It
prints a table, the one of docs/sweep.md.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from architectures import disagreements
from torch import nn

import hdrq

TIMM = (  # a picture's side after the colon, else 32
    "resnet18",
    "resnet26d",
    "seresnet33ts",
    "vgg11_bn",
    "hrnet_w18_small",
    "res2net50_26w_4s",
    "resnest14d",
    "repvgg_a0",
    "convnext_atto",
    "mobileone_s0",
    "starnet_s1",
    "repvit_m0_9",
    "inception_v3:96",
    "nf_resnet26",
    "mambaout_femto",
    "densenet121:64",
    "resnetv2_50:64",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv2_050",
    "mobilenetv3_small_100",
    "mnasnet_050",
    "mixnet_s",
    "fbnetc_100",
    "ghostnet_050",
    "regnety_002",
    "gernet_s",
    "rexnet_100",
    "cspresnet50",
    "vovnet39a",
    "xception41:64",
    "dpn68:64",
    "mobilevitv2_050:64",
    "efficientvit_b0",
    "lcnet_050",
    "tinynet_e",
)
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
TEXT = SMALL | {"vocab_size": 40, "max_position_embeddings": 16}
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
PICTURE = SMALL | {"image_size": 32, "patch_size": 8}
STAGES = {"image_size": 32, "depths": [1, 1], "hidden_sizes": [8, 16]}
TRANSFORMERS = {
    "BertModel": TEXT,
    "RobertaModel": TEXT,
    "XLMRobertaModel": TEXT,
    "ElectraModel": TEXT | {"embedding_size": 16},
    "AlbertModel": TEXT | {"embedding_size": 16},
    "DistilBertModel": {"vocab_size": 40, "dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32},
    "MPNetModel": TEXT,
    "ErnieModel": TEXT,
    "DebertaV2Model": TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "GPT2Model": {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_head": 2, "n_layer": 2},
    "GPTNeoXModel": TEXT,
    "OPTModel": TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "LlamaModel": DECODER,
    "MistralModel": DECODER,
    "Qwen2Model": DECODER,
    "GemmaModel": DECODER,
    "PhiModel": TEXT,
    "MixtralModel": DECODER | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "ViTModel": PICTURE,
    "DeiTModel": PICTURE,
    "BeitModel": PICTURE,
    "Dinov2Model": PICTURE,
    "CLIPVisionModel": PICTURE,
    "SiglipVisionModel": PICTURE,
    "SwinModel": {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    | {"window_size": 4},
    "ConvNextModel": {"num_stages": 2, "depths": [1, 1], "hidden_sizes": [8, 16]},
    "ConvNextV2Model": {"num_stages": 2, "depths": [1, 1], "hidden_sizes": [8, 16]},
    "ResNetModel": STAGES | {"embedding_size": 8},
    "RegNetModel": STAGES | {"embedding_size": 8, "groups_width": 8},
    "MobileNetV2Model": {"image_size": 32, "depth_multiplier": 0.25},
    "SegformerModel": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
    "PoolFormerModel": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]},
    "Wav2Vec2Model": SMALL
    | {"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
WAVES = ("Wav2Vec2Model",)


class Named(type):
    """A class whose attributes are their names: members of enumerations, where nothing but the name is needed."""

    def __getattr__(cls, name: str) -> str:
        return name


class Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of torchvision: every name in them is an empty class."""

    def find_spec(self, fullname, path, target=None):
        own = fullname.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if own else None

    def exec_module(self, module: types.ModuleType) -> None:
        def missing(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return Named(name, (nn.Module,) if name.startswith("Frozen") else (), {})

        module.__dict__["__getattr__"], module.__dict__["__version__"] = missing, "0"


@contextmanager
def torchvision() -> Iterator[None]:
    """Inside, torchvision can be imported, as a stub where it is missing; transformers must not find that one later."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    stub = Stub()
    sys.meta_path.append(stub)
    try:
        yield
    finally:
        sys.meta_path.remove(stub)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def timm_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    with torchvision():
        import timm

    name, _, side = name.partition(":")
    model, x = timm.create_model(name, pretrained=False, num_classes=10), torch.randn(4, 3, *[int(side or 32)] * 2)
    with torch.no_grad():
        for _ in range(3):
            model(x)  # statistics of BatchNorm
    return model.eval(), x


def transformers_model(name: str) -> tuple[nn.Module, list[dict]]:
    import transformers

    kind = getattr(transformers, name)
    options = TRANSFORMERS[name]
    model = kind(kind.config_class(**options)).eval()
    if name in WAVES:
        return model, [{"input_values": torch.randn(8, 400)}]
    if "vocab_size" in options:
        return model, [{"input_ids": torch.randint(3, 40, (8, 7)), "attention_mask": torch.ones(8, 7).long()}]
    return model, [{"pixel_values": torch.randn(8, 3, 32, 32)}]


def outcome(name: str) -> str:
    """What becomes of a family: "quantized", or why not."""
    torch.manual_seed(0)
    library, _, kind = name.rpartition("/")
    try:
        model, data = timm_model(kind) if library == "timm" else transformers_model(name)
    except (AttributeError, RuntimeError) as error:
        return f"not in this release: {error}"
    options = {"bits": {"*": "W8A8"}, "batch_size": 2, "progress": False}
    try:
        hdrq.quantize(model, data, "rtn", **options)
        wrong = disagreements(model, hdrq.quantize(model, data, "hdrq", iterations=2, distance=0, **options), data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "; ".join(["quantized", *wrong])


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| Family | Outcome | Seconds |\n| --- | --- | --- |")
    for name in names or [*(f"timm/{name}" for name in TIMM), *TRANSFORMERS]:
        start = time.perf_counter()
        found = " ".join(outcome(name).split()).replace("|", "\\|")
        print(f"| {name} | {found} | {time.perf_counter() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
