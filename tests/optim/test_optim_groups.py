"""Every parameter in exactly one group, and every mistake named."""

import pytest
from torch import nn

from nanovl.config.schema import OptimizerGroup as Group
from nanovl.errors import ConfigError
from nanovl.optim.groups import assign, shorten


def model() -> nn.ModuleDict:
    block = lambda: nn.ModuleDict({"proj": nn.Linear(4, 6, bias=False), "norm": nn.RMSNorm(4)})  # noqa: E731
    return nn.ModuleDict({"embed": nn.Embedding(10, 4), "layers": nn.ModuleList([block(), block()])})


def test_the_first_match_over_the_whole_name_wins() -> None:
    matrices = Group(match=r"layers\..*proj\.weight", kind="muon")
    groups = [matrices, Group(match=r".*weight"), Group(match="embed")]
    with pytest.raises(ConfigError, match="matches none of the 5 parameters"):
        assign(model().named_parameters(), groups)  # "embed" is a part of a name only
    taken = assign(model().named_parameters(), groups[:2])
    assert [[name for name, _ in group.parameters] for group in taken] == [
        ["layers.0.proj.weight", "layers.1.proj.weight"],
        ["embed.weight", "layers.0.norm.weight", "layers.1.norm.weight"],
    ]
    assert [group.elements for group in taken] == [48, 48]


def test_all_mistakes_are_named_at_once() -> None:
    groups = [
        Group(match=r"layers\..*", kind="muon", beta1=0.9),
        Group(match=r"layers\.0\..*"),
        Group(match=r"lm_head\.weight"),
    ]
    with pytest.raises(ConfigError) as caught:
        assign(model().named_parameters(), groups)
    text = str(caught.value)
    assert "no pattern matches 1 of 5 parameters: embed.weight; name them in a group" in text
    assert "groups.0.kind = 'muon': takes matrices only" in text
    assert "layers.*.norm.weight (x2) with fewer than 2 dimensions" in text
    assert "groups.0.beta1 = 0.9: muon has no beta1" in text
    assert "groups.1.match" in text
    assert "the 2 parameters it matches are taken by groups before it; move it up" in text
    assert "groups.2.match = 'lm_head\\\\.weight': matches none of the 5 parameters" in text
    assert len(caught.value.mistakes) == 5


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="all 5 parameters of the model are frozen"):
        assign(model().requires_grad_(False).named_parameters(), [Group(match=".*")])


def test_frozen_parameters_need_no_group_and_get_none() -> None:
    frozen = model()
    frozen["embed"].requires_grad_(False)
    frozen["layers"][1]["norm"].requires_grad_(False)
    taken = assign(frozen.named_parameters(), [Group(match=r"layers\..*")])
    assert [name for name, _ in taken[0].parameters] == [
        "layers.0.proj.weight",
        "layers.0.norm.weight",
        "layers.1.proj.weight",
    ]


def test_a_stage_may_leave_groups_empty_that_other_stages_fill() -> None:
    whole = model()
    sizes = {name: p.numel() for name, p in whole.named_parameters()}
    last = [(name, p) for name, p in whole.named_parameters() if name.startswith("layers.1.")]
    groups = [
        Group(match="embed.weight"),
        Group(match=r"layers\.0\..*", kind="muon", beta1=0.5),
        Group(match=".*"),
    ]
    with pytest.raises(ConfigError) as caught:
        assign(last, groups, sizes)
    assert [m.split(":")[0] for m in caught.value.mistakes] == ["optimizer.groups.1.beta1 = 0.5"]
    groups[1].beta1 = None
    taken = assign(last, groups, sizes)
    assert [[name for name, _ in group.parameters] for group in taken] == [
        [],
        [],
        ["layers.1.proj.weight", "layers.1.norm.weight"],
    ]
    by_taker = [sizes["embed.weight"], sizes["layers.0.proj.weight"] + sizes["layers.0.norm.weight"]]
    assert [group.elements for group in taken] == [*by_taker, sum(sizes.values()) - sum(by_taker)]
    with pytest.raises(ConfigError, match=r"lm_head.*matches none of the 5 parameters"):
        assign(last, [Group(match="lm_head"), Group(match=".*")], sizes)
    with pytest.raises(ConfigError, match="taken by groups before it"):
        assign(last, [Group(match=".*"), Group(match="embed.weight")], sizes)


def test_a_frozen_stage_is_no_mistake_but_a_frozen_model_is() -> None:
    whole = model().requires_grad_(False)
    sizes = {name: p.numel() for name, p in whole.named_parameters()}
    stage = list(whole.named_parameters())[:2]
    assert [group.parameters for group in assign(stage, [Group(match=".*")], sizes)] == [[]]
    with pytest.raises(ConfigError, match="all 5 parameters of the model are frozen"):
        assign(whole.named_parameters(), [Group(match=".*")], sizes)


def test_names_are_folded_over_layers_and_experts() -> None:
    names = ["layers.0.experts.0.w1", "layers.0.experts.1.w1", "layers.1.experts.0.w1", "norm2.weight"]
    assert shorten(names) == "layers.*.experts.*.w1 (x3), norm2.weight"
