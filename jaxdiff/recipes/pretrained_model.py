"""What all pretrained classes share: parameters read from published files, kept, checked and saved."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdiff.freed_memory import return_memory_after_compiling
from jaxdiff.io.hub import Fetch, open_model
from jaxdiff.io.pretrained_files import CONFIG, TRANSFORMERS, FileNames, read_config, read_leaves, write_leaves
from jaxdiff.io.runs import write_json
from jaxdiff.io.weights import check_specs, flatten_params, spec_of, unflatten_params


class FlaxPreTrainedModel:
    """A linen module with its parameters.

    Attributes:
      config: what decides shapes and function.
      module: the linen module.
      dtype: what it computes in.
      files: what the model's library calls the files.
      ignored: regular expression of names in published files that belong to no parameter of this model.
      prefix: beginning of all names, which files of torch may leave out.
    """

    files: ClassVar[FileNames] = TRANSFORMERS
    ignored: ClassVar[str] = ""
    prefix: ClassVar[str] = ""

    def __init__(self, config: Any, seed: int = 0, dtype: DTypeLike = jnp.float32, _do_init: bool = True):
        """Make a model with random parameters, or with none where `_do_init` is false."""
        self.config, self.dtype = config, dtype
        self.module = self.make_module(config, dtype)
        self._params = self.init_weights(jax.random.key(seed)) if _do_init else None

    @classmethod
    def make_module(cls, config: Any, dtype: DTypeLike) -> nn.Module:
        """Return the linen module."""
        raise NotImplementedError

    @classmethod
    def read_config(cls, values: Mapping[str, Any]) -> Any:
        """Return the config that a config.json describes."""
        raise NotImplementedError

    def example(self) -> dict[str, Any]:
        """Return the smallest input of the module."""
        raise NotImplementedError

    def config_dict(self) -> dict[str, Any]:
        """Return what config.json says of this model."""
        raise NotImplementedError

    @property
    def params(self) -> Any:
        """The parameters: nested dicts of arrays."""
        if self._params is None:
            raise ValueError("this model was made with _do_init=False and holds no parameters: give each call params=")
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        found = {name: (spec_of(leaf)[0], "any") for name, leaf in flatten_params(params).items()}
        wanted = {name: (spec_of(leaf)[0], "any") for name, leaf in flatten_params(self.params_shape_tree).items()}
        check_specs("params", found, wanted)
        self._params = params

    @property
    def params_shape_tree(self) -> Any:
        """Shapes and dtypes of the parameters."""
        return _trace_shapes(type(self), self.config, jnp.dtype(self.dtype).name)  # type: ignore[arg-type]

    def init_weights(self, key: jax.Array) -> Any:
        """Return random parameters."""
        return jax.jit(functools.partial(self.module.init, **self.example()))(key)["params"]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        dtype: DTypeLike = jnp.float32,
        from_pt: bool = False,
        variant: str | None = None,
        _do_init: bool = True,
        **options: Any,
    ) -> Any:
        """Read a published model.

        Args:
          name_or_path: OWNER/NAME on the Hugging Face hub, or a folder with config.json and flax_model.msgpack,
            model.safetensors or pytorch_model.bin (both in shards or whole), which are looked for in this order.
          revision: branch, tag or commit on the hub.
          subfolder: of the folder or of the hub's repository.
          dtype: what the networks compute in.
          from_pt: pass over flax_model.msgpack.
          variant: read the files with this word before their ending, such as fp16; None means the plain ones, and where
            there are none those of `jaxdiff.io.pretrained_files.VARIANTS`.
          _do_init: whether the model keeps the parameters.
          **options: cache_dir, token or local_files_only, as in huggingface_hub.

        Returns:
          The model; with `_do_init=False` the model, which holds no parameters, and the parameters.

        Raises:
          InputError: files are missing, damaged or another model's, an option is not known, or the hub cannot be
            reached.
        """
        fetch = open_model(name_or_path, revision, subfolder, **options)
        model = cls(cls.read_config(read_config(str(name_or_path), fetch, cls.files)), dtype=dtype, _do_init=False)
        where = f"{name_or_path}/{subfolder}" if subfolder else str(name_or_path)
        params = model.read_params(where, fetch, from_pt, variant)
        if not _do_init:
            return model, params
        model._params = params
        return model

    def read_params(
        self,
        name: str,
        fetch: Fetch,
        from_pt: bool = False,
        variant: str | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> dict[str, Any]:
        """Return the published parameters of this model, which does not keep them.

        Args:
          name: of the model, for messages.
          fetch: from `open_model`.
          from_pt: as in `from_pretrained`.
          variant: the same.
          dtype: that the parameters shall have.

        Raises:
          InputError: files are missing, damaged or another model's, or hold numbers that are too large for `dtype`.
        """
        return_memory_after_compiling()
        wanted = self.params_shape_tree
        leaves = read_leaves(name, fetch, wanted, self.ignored, self.prefix, from_pt, self.files, variant, dtype)
        # One after another, so that no second copy of the model lies in memory; jnp.asarray would compile a program for
        # every shape, and keep them all.
        return unflatten_params({leaf: jax.device_put(value) for leaf, value in leaves})

    def save_pretrained(
        self, folder: str | Path, params: Mapping[str, Any] | None = None, safe_serialization: bool = False
    ) -> None:
        """Write config.json and the parameters.

        Args:
          folder: made where it is missing.
          params: other parameters than the model's own.
          safe_serialization: write model.safetensors, which PyTorch classes read too, instead of flax_model.msgpack.

        Raises:
          InputError: model.safetensors is to stand beside a flax_model.msgpack, which would be read instead of it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_leaves(folder, self.params if params is None else params, safe_serialization, self.files)
        write_json(folder / CONFIG, self.config_dict())

    def to_bf16(self, params: Any) -> Any:
        """Return the parameters as bfloat16."""
        return cast(params, jnp.bfloat16)

    def to_fp16(self, params: Any) -> Any:
        """Return the parameters as float16."""
        return cast(params, jnp.float16)

    def to_fp32(self, params: Any) -> Any:
        """Return the parameters as float32."""
        return cast(params, jnp.float32)


def cast(params: Any, dtype: DTypeLike) -> Any:
    """Return the floating-point leaves as another type."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)


@functools.cache
def _trace_shapes(kind: type[FlaxPreTrainedModel], config: Any, dtype: str) -> Any:
    """Return the shapes and dtypes of a model's parameters, traced once, because that takes seconds."""
    model = kind(config, dtype=dtype, _do_init=False)
    return jax.eval_shape(functools.partial(model.module.init, **model.example()), jax.random.key(0))["params"]
