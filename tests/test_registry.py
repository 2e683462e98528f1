"""Names: taken ones, unknown ones, patterns."""

import pytest
from paddle import nn

from paddle_reparam import registry
from paddle_reparam.errors import ReparamError, UnknownName
from paddle_reparam.registry import Registry


@pytest.fixture
def empty(monkeypatch):
    """Registries of their own, so that these tests neither see nor leave names."""
    monkeypatch.setattr(registry, "_layers", Registry("layer"))
    monkeypatch.setattr(registry, "_models", Registry("model"))


class ToyConv2D(nn.Layer):
    pass


def ResNet18_Toy(class_num=1000):
    return class_num


def test_a_layer_is_registered_under_its_class_name_and_stays_itself(empty):
    assert registry.register_layer(ToyConv2D) is ToyConv2D
    assert registry.list_layers() == ["ToyConv2D"]
    assert registry.get_layer("ToyConv2D").layer is ToyConv2D
    assert registry.get_layer("ToyConv2D").untestable is None


def test_a_layer_can_say_why_the_contract_test_cannot_test_it(empty):
    assert registry.register_layer(untestable="it is a whole block")(ToyConv2D) is ToyConv2D
    assert registry.get_layer("ToyConv2D").untestable == "it is a whole block"


def test_a_model_is_registered_under_its_function_name_and_gets_its_arguments(empty):
    assert registry.register_model(ResNet18_Toy) is ResNet18_Toy
    assert registry.list_models() == ["ResNet18_Toy"]
    assert registry.get_model("ResNet18_Toy").build is ResNet18_Toy
    assert registry.get_model("ResNet18_Toy").published == ()
    assert registry.create_model("ResNet18_Toy") == 1000
    assert registry.create_model("ResNet18_Toy", class_num=10) == 10


def test_a_model_carries_what_was_published_of_it(empty):
    published = [registry.Published("its paper", 70.5, {"class_num": 10}, 32)]
    assert registry.register_model(published=published, rename=dict)(ResNet18_Toy) is ResNet18_Toy
    entry = registry.get_model("ResNet18_Toy")
    assert (entry.published, entry.rename) == (tuple(published), dict)


@pytest.mark.parametrize(("kind", "thing"), [("layer", ToyConv2D), ("model", ResNet18_Toy)])
def test_a_name_that_is_taken_is_an_error_and_keeps_the_first(empty, kind, thing):
    register = getattr(registry, f"register_{kind}")
    register(thing)
    first = getattr(registry, f"get_{kind}")(thing.__name__)
    with pytest.raises(ReparamError, match=rf"a {kind} named '{thing.__name__}' is registered already"):
        register(thing)
    assert getattr(registry, f"get_{kind}")(thing.__name__) == first


def test_layers_and_models_do_not_share_names(empty):
    registry.register_layer(ToyConv2D)
    assert registry.list_models() == []
    with pytest.raises(UnknownName, match="there is no model named 'ToyConv2D'"):
        registry.create_model("ToyConv2D")


@pytest.mark.parametrize("typo", ["RefConv", "refconv2d", "RefCnv2D", "REFCONV2D"])
def test_an_unknown_name_is_answered_with_the_nearest(typo):
    names = Registry("layer")
    for name in ("RefConv2D", "SPConv2D", "DCDLinear"):
        names.add(name, name)
    with pytest.raises(UnknownName, match=rf"there is no layer named '{typo}'; did you mean RefConv2D"):
        names.get(typo)


def test_a_name_like_no_other_is_answered_with_all():
    names = Registry("layer")
    names.add("RefConv2D", 1)
    with pytest.raises(UnknownName, match=r"no layer named 'zzz'; known: RefConv2D$"):
        names.get("zzz")


def test_patterns_are_those_of_a_shell_without_regard_to_case():
    names = Registry("model")
    for name in ("VGG16_SPConv", "ResNet50_SPConv", "SLaK_tiny", "SLaK_small"):
        names.add(name, name)
    assert names.names() == ["ResNet50_SPConv", "SLaK_small", "SLaK_tiny", "VGG16_SPConv"]
    assert names.names("*spconv*") == ["ResNet50_SPConv", "VGG16_SPConv"]
    assert names.names("SLAK_[ts]*") == ["SLaK_small", "SLaK_tiny"]
    assert names.names("slak_tin?") == ["SLaK_tiny"]
    assert names.names(["spconv", "slak_*", "*_tiny"]) == ["SLaK_small", "SLaK_tiny"]
    assert names.names("spconv") == []


def test_of_many_names_some_are_listed():
    registry = Registry("thing")
    for number in range(400):
        registry.add(f"name{number}", number)
    with pytest.raises(UnknownName, match="400 are known, such as name0, ") as caught:
        registry.get("zzz")
    assert len(str(caught.value)) < 400
