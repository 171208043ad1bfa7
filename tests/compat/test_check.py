from pathlib import Path

import pytest
import standin

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


def test_no_such_path(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", "no/such/path"])
    assert ended.value.code == 2
    assert "PATH must be a file or a folder that is there, got no/such/path" in capsys.readouterr().err
