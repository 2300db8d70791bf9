"""One engine: built, compared with eager, published."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from engines.compilers.base import Compiler
from engines.errors import EngineAccuracyError, EngineError
from engines.manifest import Manifest
from engines.run.accuracy import check_accuracy, tolerance_of, worst_relative_l2
from engines.spec import EngineSpec, WeightsMode
from engines.stopwatch import Stopwatch
from engines.store import EngineStore
from engines.weights.bank import WeightBank

log = logging.getLogger(__name__)


def build_engine(
    compiler: Compiler,
    store: EngineStore,
    module: nn.Module,
    spec: EngineSpec,
    inputs: Mapping[str, Tensor] | None = None,
) -> Manifest:
    """Build one engine into the store, unless it is there, and check it against eager before it is published.

    One that may take other weights is made of one with other weights where the store has that, without compiling; where
    it refuses them, or is wrong with them, it is built.

    Args:
        compiler: of ``spec.backend``.
        store: where it goes.
        module: the component with its weights, on the target's device.
        spec: from the compiler's plan.
        inputs: to compare on; None takes numbers of the right shapes.

    Raises:
        EngineAccuracyError: too far from eager.
        EngineError: it cannot be compiled.
    """

    def builder(folder: Path) -> Manifest:
        relatives = store.relatives(spec) if spec.weights_mode is WeightsMode.REFITTABLE else []
        for relative in relatives[:1]:
            try:
                built = store.folder(relative.key)
                return checked(compiler.refitted(relative, built, module, spec, folder), folder)
            except EngineError as error:
                log.info("%s is built anew for these weights: %s", spec.title, error)
                for left in folder.iterdir():
                    left.unlink()
        return checked(compiler.build(module, spec, folder), folder)

    def checked(manifest: Manifest, folder: Path) -> Manifest:
        watch = Stopwatch()
        bank = WeightBank(module)
        try:
            engine = compiler.load(manifest, folder, bank)
            seconds = watch.seconds
            error = worst_relative_l2(engine, module, inputs)
            engine.unload()
            check_accuracy(spec, error)
        except EngineAccuracyError as inaccurate:
            raise EngineAccuracyError(f"{inaccurate}; it is not published. Use --backend eager") from None
        finally:
            bank.close()
        return manifest.updated(relative_l2=error, tolerance=tolerance_of(spec), load_seconds=seconds)

    return store.build(spec.key, builder)
