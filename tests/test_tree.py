"""Settings by name."""

import pytest

from rcm import networks
from rcm.tree import options, settings_of


def test_what_takes_sizes_from_an_experiment_is_no_setting_by_name() -> None:
    assert "wan-tiny" in options("network")
    with pytest.raises(ValueError, match="'wan-tiny' is part of an experiment: expected one of cosmos") as found:
        networks.build("wan-tiny")
    assert "wan-tiny" not in str(found.value).partition("one of ")[2]
    with pytest.raises(ValueError, match=r"unknown codec 'wan': expected one of cells, wan2\.1-vae"):
        settings_of("codec", "wan")
