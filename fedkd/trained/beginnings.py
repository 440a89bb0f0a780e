"""Weights that were trained elsewhere, for a model of this run: read, and refused if none of it."""

from collections.abc import Sequence
from pathlib import Path

from fedkd.inputs import InputShape
from fedkd.models import ModelSettings, build_model
from fedkd.own_code import asking
from fedkd.trained.files import ModelFileError, fill, read_info, read_tensors
from fedkd.training import Arrays
from fedkd.training.state import to_arrays


def weights_from(
    path: Path,
    model: ModelSettings,
    *,
    input_shape: InputShape,
    class_names: Sequence[str],
    setting: str,
) -> Arrays:
    """Return the weights in a file, which have to be those of a model.

    Args:
        path: a safetensors file: of a model that a run kept, or of anybody's whose tensors have
            the model's names, shapes and types.
        model: whose weights they are to be.
        input_shape: of the run.
        class_names: of the run. Where the file says which classes it has, they must be these, in
            this order.
        setting: that names the file, for messages.

    Returns:
        Parameters and buffers by name.

    Raises:
        ValueError: naming the setting, the file and the first tensors that do not fit.
    """
    try:
        tensors = read_tensors(path)
        with asking(_looking):
            info = read_info(path)
        module = build_model(model, input_shape=input_shape, num_classes=len(class_names), seed=0)
        fill(module, tensors, repr(str(path)))
    except ModelFileError as error:
        raise ValueError(f"{setting}: {error}") from None
    if info is not None and info.class_names != tuple(class_names):
        theirs, ours = (", ".join(names[:6]) for names in (info.class_names, class_names))
        raise ValueError(
            f"{setting}: {str(path)!r} has logits of other classes ({theirs}) than this run "
            f"({ours})"
        )
    return to_arrays(module.state_dict())


def _looking(_name: str) -> bool:
    """Let the file name any code: none of it is loaded, the run has a model of its own."""
    return False
