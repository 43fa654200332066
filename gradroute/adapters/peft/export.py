"""Plain LoRA checkpoints of a routed model, for engines that know nothing of gradroute.

    deployed:             A = A_d,         B = s_d B_d
    deployed at a scale:  A = [A_d; A_q],  B = [s_d B_d, scale s_q B_q]
    full:                 the same, scale 1

Scalings are folded into B (alpha / r = 1) and ranks are padded with zeros to one r, for readers such as vLLM's ignore
`rank_pattern` and `alpha_pattern`.
"""

from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from gradroute._all_ranks import written_by_one
from gradroute._checks import share
from gradroute._hashing import deployed_hash, hash_in_card, scale_in_card
from gradroute._logging import warn
from gradroute._protocol import BlockName, check_module
from gradroute.adapters.peft._reload import Factors
from gradroute.adapters.peft.plain_lora import PREFIX, PlainLora
from gradroute.errors import GradRouteError


def export_deployed(model: nn.Module, path: str | Path, *, card: str | Path | None = None, scale: float = 0.0) -> None:
    """Write the deployed block alone, rank r, as a plain LoRA checkpoint that stock `peft` loads.

    At a scale above 0 a part of the quarantine is in it too, rank r + r_quarantine: the model under
    `ablate_quarantine(model, scale)`. `DoseCurve.pick` picks a scale.

    Of a sharded model every rank calls it: all gather the blocks, the first one writes, and none returns before that.

    Args:
        model: from `attach`, `get_peft_model`, or with an adapter injected by PEFT or transformers.
        path: a folder; it is created, and files of an earlier export in it are overwritten.
        card: the file that `write_card` returned for these weights and this scale; copied beside them as `README.md`.
        scale: of the quarantine, in [0, 1].

    Raises:
        GradRouteError: a block is not finite; a card of other weights or another scale, given or left in `path`; a
            scale out of range; a sharded model that some rank does not export.
    """
    folder, scale = checked_folder(path), share("scale", scale)
    readme = folder / "README.md"
    with written_by_one("export_deployed", check_module(model)) as writes:
        # All ranks read the model, one reads and writes files.
        digest = deployed_hash(model, scale)
        plain, factors, others = _gathered(model, ["deployed", "quarantine"] if scale else ["deployed"], scale)
        if writes:
            text = _card_of(digest, scale, readme if card is None else Path(card), given=card is not None)
            plain.write(folder, factors, others)
            if text is not None:
                readme.write_text(text, encoding="utf-8")


def export_full(model: nn.Module, path: str | Path) -> None:
    """Write both blocks, rank r + r_quarantine, as one plain LoRA: the policy that is trained, for sampling.

    Args:
        model, path: as for `export_deployed`.

    Raises:
        GradRouteError: a block is not finite; a sharded model that some rank does not export.
    """
    folder = checked_folder(path)
    with written_by_one("export_full", check_module(model)) as writes:
        plain, factors, others = _gathered(model, ["deployed", "quarantine"])
        if writes:
            plain.write(folder, factors, others)


def checked_folder(path: object, argument: str = "path") -> Path:
    """`path`, if it is a folder or can become one; `argument` is what the user calls it."""
    if not isinstance(path, str | PathLike) or Path(path).is_file():
        found = f"the file {path}" if isinstance(path, str | PathLike) else type(path).__name__
        raise GradRouteError(f"`{argument}` should be a folder, there or to be made. Found {found}.")
    return Path(path)


def _card_of(digest: str, scale: float, file: Path, *, given: bool) -> str | None:
    """The text of a card that speaks of weights with this hash; None where there is no card and none was given."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = hash_in_card(text)
    if found is None and given:
        raise GradRouteError(f"`card` should be a file that write_card wrote. Found none at {file}.")
    if found is not None and found != digest:
        where = "`card`" if given else "The card in `path`"
        if scale_in_card(text) != scale:
            raise GradRouteError(
                f"{where} should be of the scale that is exported, {scale:g}. Found one of scale "
                f"{scale_in_card(text):g}: {file}. Fix: write_card(..., scale={scale:g}), or the scale of the card."
            )
        raise GradRouteError(
            f"{where} should be of the weights that are exported. Found one of other weights: {file}. "
            "Fix: write_card(...) of this model."
        )
    return None if found is None else text


def export_refusal(model: nn.Module) -> str | None:
    """Why `export_deployed` would refuse the model; None if it would not."""
    try:
        plain = PlainLora(model)
        plain.check(plain.factors(["deployed"]))
    except GradRouteError as error:
        return str(error)
    return None


def _gathered(
    model: nn.Module, blocks: list[BlockName], scale: float = 1.0
) -> tuple[PlainLora, Factors, dict[str, Tensor]]:
    """What a checkpoint of these blocks holds: factors, with the quarantine at `scale`, and modules trained whole."""
    plain = PlainLora(model)
    factors = plain.factors(blocks, scale=scale)
    plain.check(factors)
    whole = plain.whole_modules()
    if whole:
        warn(
            f"The export holds whole modules, such as `{next(iter(whole)).removeprefix(PREFIX)}` (`modules_to_save`): "
            "PEFT loads them, vLLM refuses the adapter. Fix, for vLLM: merge_deployed(model) and save the model."
        )
    return plain, factors, whole
