"""Pytest plugin that turns timm's own test-suite on this family: its lists name our models, and nothing else runs."""

import fnmatch
import os

import pytest
import timm
import timm.models

import glattn  # noqa: F401 (registers the family)

_list_models = timm.list_models
_CHOSEN = os.environ["GLATTN_CONTRACT_MODELS"].split(",")


def _of_the_family(filter="", module="", **kwargs):  # noqa: A002 (timm's name)
    names = _list_models(filter, module="glattn", **kwargs)
    return [name for name in names if any(fnmatch.fnmatch(name.partition(".")[0], chosen) for chosen in _CHOSEN)]


timm.list_models = timm.models.list_models = _of_the_family


_OF_WEIGHTS = ("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained")


def _runs(item):
    name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
    if "glattn" not in str(name):
        return False
    # the package's weights are loaded; those that are the Hub's, once they are there, are not to be had
    return item.originalname not in _OF_WEIGHTS or timm.get_pretrained_cfg(name).file is not None


def pytest_collection_modifyitems(config, items):
    """Keep the cases that are about one of our models, and those of weights where the package has them."""
    kept = [item for item in items if _runs(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:  # what it asserts is no matter of how busy the machine is
        item.add_marker(pytest.mark.timeout(1800), append=False)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Know timm's markers without its configuration file."""
    for name in (
        "base",
        "cfg",
        "cfg_nonstd",
        "forward",
        "backward",
        "torchscript",
        "features",
        "fxforward",
        "fxbackward",
    ):
        config.addinivalue_line("markers", name)
