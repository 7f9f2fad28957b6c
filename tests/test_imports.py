"""What importing the package does, and which of its parts may import which."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from models import MEMORY_LAYERS, tiny_model
from peft import get_peft_model

import senri_hf


ROOT = Path(__file__).parent.parent


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own that does not know the package's tests."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_imports_point_downwards_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_a_wrong_import_would_be_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    contract = '[tool.importlinter]\nroot_package = "senri_hf"\n'
    assert contract in text
    upside_down = """
        [[tool.importlinter.contracts]]
        name = "Memory is above adapters"
        type = "layers"
        layers = ["senri_hf.memory", "senri_hf.adapters"]
    """
    (tmp_path / "pyproject.toml").write_text(contract + textwrap.dedent(upside_down))
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(tmp_path / "pyproject.toml"), no_cache=True) != 0
    assert "BROKEN" in capsys.readouterr().out


def test_the_package_is_light_and_peft_knows_it_whenever_peft_is_imported() -> None:
    result = run_python(
        """
        import sys
        import senri_hf
        heavy = {"torch", "peft", "transformers", "datasets", "numpy"} & sys.modules.keys()
        assert not heavy, heavy

        import importlib.util
        assert importlib.util.find_spec("peft") is not None  # transformers asks like this before it imports peft
        assert "peft" not in sys.modules
        senri_hf.MemoryAdapterConfig()
        import inspect, peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        assert PEFT_TYPE_TO_CONFIG_MAPPING["SENRI"] is senri_hf.MemoryAdapterConfig
        assert type(peft.__loader__) is type(peft.__spec__.loader) is type(importlib.util.find_spec("json").loader)
        assert "PeftModel" in inspect.getsource(peft)
        assert not any(type(finder).__module__.startswith("senri_hf") for finder in sys.meta_path)
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("first", ["senri_hf.MemoryTransformerForCausalLM", "senri_hf.modeling.memory_transformer"])
def test_a_model_may_be_the_first_thing_imported(first: str) -> None:
    result = run_python(
        f"""
        import importlib, senri_hf
        module, _, name = {first!r}.rpartition(".")
        getattr(importlib.import_module(module), name) if name[0].isupper() else importlib.import_module({first!r})
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.for_model(
            "memory_transformer", hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=7
        )
        assert type(AutoModelForCausalLM.from_config(config)) is senri_hf.MemoryTransformerForCausalLM
        """
    )
    assert result.returncode == 0, result.stderr


def test_an_adapter_needs_the_package_which_may_be_imported_after_peft(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), senri_hf.MemoryAdapterConfig(layers_to_transform=MEMORY_LAYERS))
    model.save_pretrained(tmp_path)
    result = run_python(
        f"""
        from peft import PeftConfig
        try:
            PeftConfig.from_pretrained({str(tmp_path)!r})
        except KeyError as error:
            assert "SENRI" in str(error), error
        else:
            raise AssertionError("loaded without the package")
        import senri_hf
        config = PeftConfig.from_pretrained({str(tmp_path)!r})
        assert isinstance(config, senri_hf.MemoryAdapterConfig), config
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import senri_hf, transformers.modeling_layers",
        "import senri_hf; from transformers import LlamaForCausalLM",
        "import transformers.models.auto.modeling_auto, senri_hf",
        "from transformers import AutoConfig; import senri_hf; from transformers import AutoModel",
    ],
)
def test_the_auto_classes_know_every_family_in_any_order_of_imports(first: str) -> None:
    """And import none of them before one is asked for."""
    result = run_python(
        f"""
        {first}
        import sys
        assert not any(name.startswith(("senri_hf.modeling", "senri_hf.interpretability")) for name in sys.modules)
        from transformers.models.auto import configuration_auto, modeling_auto
        from senri_hf.families import FAMILIES, TABLES
        for model_type, family in FAMILIES.items():
            config = configuration_auto.CONFIG_MAPPING[model_type]
            assert config.__name__ == family.prefix + "Config" and config.model_type == model_type
            for kind in family.models:
                table = getattr(modeling_auto, TABLES[kind].removesuffix("_NAMES"))
                assert table[config].__name__ == family.prefix + kind
                assert table[config].__module__ == f"senri_hf.{{family.package}}.{{family.module}}"
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", [name for name in senri_hf.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(senri_hf, name)
    assert value.__doc__ and value.__doc__.strip()
    assert not value.__doc__.startswith(f"{name}("), "a dataclass's own signature explains nothing"
    assert name in dir(senri_hf)


@pytest.mark.parametrize("module", ["adapters", "memory", "configuration", "training"])
def test_every_name_that_a_part_exports_is_explained(module: str) -> None:
    part = importlib.import_module(f"senri_hf.{module}")
    assert part.__all__ == sorted(part.__all__)
    for name in part.__all__:
        assert getattr(part, name).__doc__


def test_every_public_name_has_a_place_to_come_from() -> None:
    assert set(senri_hf.__all__) == {"__version__", *senri_hf._MODULES}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Telepathy'"):
        senri_hf.Telepathy  # noqa: B018
