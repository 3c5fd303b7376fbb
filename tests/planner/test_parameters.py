"""Parameter counts and sizes against what transformers and peft build, and against published totals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from built import SMALL, built, count, transformers_config

from rlhf.config.schema import ArchitectureConfig, ModelConfig, ScratchConfig, WeightSource
from rlhf.launcher.command import PROJECT
from rlhf.models.lora import add_adapters
from rlhf.planner.architecture import FAMILIES, architecture_of, from_directory
from rlhf.planner.parameters import (
    Head,
    block_linears,
    lora_parameter_count,
    norm_and_embedding_parameters,
    parameter_count,
    scalar_head_parameters,
)

MODELS = PROJECT / "conf" / "model"
PUBLISHED = {
    "opt125m": 125_239_296,
    "opt350m": 331_196_416,
    "opt1.3b": 1_315_758_080,
    "opt2.7b": 2_651_596_800,
    "opt6.7b": 6_658_473_984,
    "opt13b": 12_853_473_280,
    "opt30b": 29_974_540_288,
    "opt66b": 65_719_701_504,
    "opt175b": 174_604_468_224,
    "bloom-560m": 559_214_592,
    "bloom-1.1b": 1_065_314_304,
    "bloom-1.7b": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7.1b": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


def model_config(name: str) -> ModelConfig:
    """A file of conf/model as far as its sizes go."""
    values = yaml.safe_load((MODELS / f"{name}.yaml").read_text(encoding="utf-8"))
    return ModelConfig(
        name=values["name"],
        source=WeightSource[values.get("source", "pretrained")],
        lora_targets=values.get("lora_targets", []),
        scratch=ScratchConfig(**values.get("scratch", {})),
        architecture=ArchitectureConfig(**values.get("architecture", {})),
    )


def known_models() -> list[str]:
    """The models whose sizes are known without a directory."""
    names = sorted(path.stem for path in MODELS.glob("*.yaml"))
    return [name for name in names if architecture_of(model_config(name)) is not None]


def sizes_of(name: str) -> ArchitectureConfig:
    """The sizes of one of them."""
    sizes = architecture_of(model_config(name))
    assert sizes is not None
    return sizes


def test_every_model_but_an_unknown_one_has_sizes() -> None:
    assert sorted({path.stem for path in MODELS.glob("*.yaml")} - set(known_models())) == ["hf"]
    assert {sizes_of(name).family for name in known_models()} == set(FAMILIES) == set(SMALL)


@pytest.mark.parametrize("name", known_models())
def test_counts_are_what_transformers_builds(name: str) -> None:
    sizes = sizes_of(name)
    for head in Head:
        assert parameter_count(sizes, head=head) == count(built(sizes, head)), head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_hold_for_other_sizes_too(family: str, tied: bool) -> None:
    sizes = replace(SMALL[family], tied_embeddings=tied)
    for head in Head:
        assert parameter_count(sizes, head=head) == count(built(sizes, head)), head


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    assert parameter_count(sizes_of(name)) == PUBLISHED[name]


def adapted(sizes: ArchitectureConfig, head: Head, targets: list[str], *, only_lora: bool = True) -> int:
    """What trains of a model with adapters of rank 4."""
    model = built(sizes, head)
    add_adapters(model, rank=4, alpha=8.0, dropout=0.0, targets=targets, seed=0, only_lora=only_lora)
    return count(model, trainable=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_what_peft_adds(family: str) -> None:
    sizes = SMALL[family]
    names = [layer.name for layer in block_linears(sizes)]
    for targets in (names, names[:1], names[-2:]):
        expected = lora_parameter_count(sizes, rank=4, targets=targets)
        assert expected == adapted(sizes, Head.lm, targets) > 0
        # The number that a scalar model ends in is trained as well.
        scalar = scalar_head_parameters(sizes)
        assert expected + scalar == adapted(sizes, Head.scalar, targets)
        others = norm_and_embedding_parameters(sizes)
        assert expected + others == adapted(sizes, Head.lm, targets, only_lora=False)
        others = norm_and_embedding_parameters(sizes, head=Head.scalar)
        assert expected + others + scalar == adapted(sizes, Head.scalar, targets, only_lora=False)


@pytest.mark.parametrize("name", ["opt1.3b", "llama2-7b", "qwen3-8b", "pythia-1b"])
def test_adapters_of_real_models(name: str) -> None:
    sizes, targets = sizes_of(name), model_config(name).lora_targets
    assert lora_parameter_count(sizes, rank=4, targets=targets) == adapted(sizes, Head.lm, targets)


@pytest.mark.parametrize("name", known_models())
def test_every_model_names_all_its_linear_layers_for_adapters(name: str) -> None:
    linears = [layer.name for layer in block_linears(sizes_of(name))]
    assert sorted(model_config(name).lora_targets) == sorted(linears)


def normalised(sizes: ArchitectureConfig) -> ArchitectureConfig:
    """Without the freedom to leave out what follows from the rest."""
    gated = sizes.family in ("llama", "qwen2", "qwen3")
    return replace(
        sizes,
        num_kv_heads=sizes.num_kv_heads or sizes.num_heads,
        head_dim=(sizes.head_dim or sizes.hidden_size // sizes.num_heads) if gated else None,
        embedding_size=sizes.embedding_size or sizes.hidden_size,
    )


@pytest.mark.parametrize("name", [*known_models(), *SMALL])
def test_a_saved_configuration_is_read_back(name: str, tmp_path: Path) -> None:
    """transformers leaves out of config.json what equals a class's default, and calls things differently."""
    sizes = SMALL[name] if name in SMALL else sizes_of(name)
    transformers_config(sizes).save_pretrained(tmp_path)
    found = from_directory(tmp_path)
    assert found is not None
    assert normalised(found) == normalised(sizes)
    assert architecture_of(ModelConfig(name="any", path=str(tmp_path))) == found


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_read_back_where_they_are_not_the_default(tied: bool, tmp_path: Path) -> None:
    for family in FAMILIES:
        transformers_config(replace(SMALL[family], tied_embeddings=tied)).save_pretrained(tmp_path / family)
        found = from_directory(tmp_path / family)
        assert found is not None and found.tied_embeddings is tied, family


def test_directories_that_tell_nothing(tmp_path: Path) -> None:
    assert from_directory(tmp_path) is None
    for content in ("{", "[1]", json.dumps({"model_type": "mamba", "hidden_size": 8})):
        (tmp_path / "config.json").write_text(content)
        assert from_directory(tmp_path) is None
    assert architecture_of(ModelConfig(name="hf")) is None
    scratch = ScratchConfig(architecture="mamba")
    assert architecture_of(ModelConfig(name="new", source=WeightSource.scratch, scratch=scratch)) is None
