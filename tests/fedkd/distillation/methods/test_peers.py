"""Methods of several models need several."""

import pytest
from pydantic import ValidationError

from fedkd.distillation.methods.codistillation import CodistillationSettings
from fedkd.distillation.methods.okddip import OKDDipSettings
from fedkd.distillation.methods.pcl import PCLSettings


@pytest.mark.parametrize(
    ("settings", "name"),
    [(OKDDipSettings, "peers"), (PCLSettings, "peers"), (CodistillationSettings, "peers")],
)
def test_methods_that_need_others_refuse_one_alone(settings, name):
    with pytest.raises(ValidationError, match=name):
        settings(peers=1)
