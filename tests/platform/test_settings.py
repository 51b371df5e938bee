"""Settings from YAML and the command line are plain data."""

from __future__ import annotations

import datetime
import json

from mobula.settings import make_config


def test_dates_become_words() -> None:
    day = datetime.date(2015, 1, 1)
    config = make_config("PPO", "cartpole", env_config={"start": day, "gravity": 9.0})
    assert config.env_config == {"start": "2015-01-01", "gravity": 9.0}
    json.dumps(config.env_config)
