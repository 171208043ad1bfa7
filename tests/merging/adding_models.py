"""A model to add changes to, and adapters of it as peft writes them."""

import hashlib
import json

import torch
from networks import data
from safetensors.torch import save_file
from torch import nn

import hdrq
from hdrq.quantizers.layers import quantized_layers

TOKENS = torch.randint(0, 11, (32, 5), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An embedding, linear layers of which one is square, and convolutions; the head stays in float."""

    def __init__(self, tie=False):
        super().__init__()
        self.embed, self.wide, self.square = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 12)
        self.conv, self.head = nn.Conv1d(12, 6, 3, padding=1), nn.Linear(6, 8)
        self.out = nn.Linear(8, 11, bias=False)
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = torch.relu(self.square(torch.relu(self.wide(self.embed(tokens)))))
        return self.out(self.head(torch.relu(self.conv(x.mT)).mT))


def net(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options).eval()


def quantized(seed=0, bits="W8A8", **options):
    bits = {"head": "float", "*": bits}
    return hdrq.quantize(net(seed), TOKENS, "rtn", bits=bits, attention=False, **options)


def factors(model, *names, rank=2, scale=0.05):
    """An adapter's tensors as peft names them, for layers of a model."""
    tensors = {}
    for k, name in enumerate(names):
        shape, key = tuple(model.get_submodule(name).weight.shape), f"base_model.model.{name}"
        a, b = data(rank, *shape[1:], seed=k) * scale, data(shape[0], rank, seed=k + 50)
        if isinstance(model.get_submodule(name), nn.Embedding):
            tensors |= {f"{key}.lora_embedding_A": data(rank, shape[0], seed=k) * scale}
            tensors |= {f"{key}.lora_embedding_B": data(shape[1], rank, seed=k + 50)}
        else:
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b.reshape(*b.shape, *(1 for _ in shape[2:]))}
    return tensors


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["wide"], "bias": "none", "lora_dropout": 0.1}


def adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def latents(model):
    return {name: layer.latent.detach() for name, layer in quantized_layers(model).items()}


def close(result, model, changes):
    """Whether every weight changed as it should, to a step where it is quantized."""
    for name, layer in quantized_layers(result).items():
        quantizer, latent = layer.weight_quantizer, layer.latent
        step = quantizer.broadcast(quantizer.scale, latent)
        want = latents(model)[name] + changes.get(f"{name}.weight".removeprefix("."), 0)
        want = want.clamp(step * quantizer.qmin, step * quantizer.qmax)
        assert ((latent - want).abs() < 1.001 * step).all(), name
    for name, value in result.state_dict().items():
        if "parametrizations" not in name and isinstance(value, torch.Tensor) and value.is_floating_point():
            want = model.state_dict()[name] + changes.get(name, 0)
            torch.testing.assert_close(value, want, rtol=0, atol=1e-6, msg=name)


def product(tensors, name, scale):
    a, b = tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"]
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:]) * scale


def save(model, path):
    hdrq.save(model, path)
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def code_shift(before, after):
    a, b = (m if isinstance(m, nn.Module) else hdrq.load(m, net()) for m in (before, after))
    quantizer = quantized_layers(a)["wide"].weight_quantizer
    return quantizer.codes(latents(b)["wide"]).int() - quantizer.codes(latents(a)["wide"]).int()
