from pathlib import Path

import pytest
import standin.loop

from hdrq.compat import patch
from hdrq.compat.__main__ import main


def test_a_tree_is_read_and_not_run(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def fake_quantize(x, scale:\n")
    (tmp_path / "own.py").write_text("raise RuntimeError\n\ndef quantize(x, delta, qmin, qmax, *, zp=0): pass\n")
    assert main(["check", str(tmp_path)]) == 0
    broken, own = capsys.readouterr().out.splitlines()
    assert broken.startswith(f"{tmp_path / 'broken.py'}: not read: ")
    assert (
        own
        == f"{tmp_path / 'own.py'}:3 quantize: tried on small numbers, as x, scale, quant_min, quant_max, zero_point"
    )


def test_it_agrees_with_what_patch_finds(capsys):
    main(["check", str(Path(standin.__file__).parent)])
    lines = capsys.readouterr().out.splitlines()
    tried = {line.split(":")[1].split()[1] for line in lines if ": tried on" in line}
    left = {line.split(":")[1].split()[1] for line in lines if ": left: it takes " in line}
    assert {"FunLSQ", "fake_noise_quantize_per_tensor", "fake_quantize_floor"} < tried
    assert left == {"fake_quantize_with_temperature", "quantize_names"}


def test_fused_forms_are_offered_by_name(capsys):
    file = Path(standin.loop.__file__)
    main(["check", str(file)])
    offered = [line for line in capsys.readouterr().out.splitlines() if "hdrq." in line]
    lines = file.read_text().splitlines()
    for name, code in [("functional.adaround", ".pow("), ("source_distance", ".norm()"), ("drop_mix", "rand_like")]:
        (line,) = (line for line in offered if name in line)
        number = int(line.removeprefix(f"{file}:").split()[0])
        assert code in lines[number - 1]
    assert len(offered) == 3
    with patch("standin") as patched:
        assert "  standin.loop, line " in patched.report() and patched.report().count("hdrq.ops.source_distance") == 1


@pytest.mark.parametrize(
    "code",
    [
        "torch.where(x > 0, a, b)",
        "(a - b).norm()",
        "torch.norm(weight)",
        "1 - x.abs().pow(2)",
        "2 - (x - 0.5).abs().pow(b)",
    ],
)
def test_what_only_looks_alike_is_not_offered(code, tmp_path, capsys):
    (tmp_path / "own.py").write_text(code)
    main(["check", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_modules_are_watched(tmp_path, capsys):
    source = "class UniformQuantizer(nn.Module):\n    def forward(self, x): pass\n"
    (tmp_path / "own.py").write_text(source + "class QuantBlock(nn.Module):\n    def forward(self, x, y): pass\n")
    main(["check", str(tmp_path)])
    verdict = "an object with a scale and a range of its own is compared at its first call"
    assert capsys.readouterr().out == f"{tmp_path / 'own.py'}:1 UniformQuantizer: {verdict}\n"


def test_no_such_path(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", "no/such/path"])
    assert ended.value.code == 2
    assert "PATH must be a file or a folder that is there, got no/such/path" in capsys.readouterr().err
