"""The README is true: its quickstart runs, its files and commands exist."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quickstart_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "quickstart.py").write_text(code, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "quickstart.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "Once" in result.stdout and "torch.Size([1, 24, 4, 3])" in result.stdout


def test_the_map_is_complete():
    listed = set(re.findall(r"^(stackformer/[\w/]+\.py) ", README, re.MULTILINE))
    present = {
        str(path.relative_to(ROOT)) for path in ROOT.glob("stackformer/**/*.py") if path.stem != "__init__"
    }
    assert listed == present
    for folder in re.findall(r"^(\w+)/ ", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_commands_exist():
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert find_spec(module) is not None, module
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets
    for path in re.findall(r"(?:configs|docs)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
