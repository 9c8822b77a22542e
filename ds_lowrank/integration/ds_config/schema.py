"""The keys and types of a DeepSpeed configuration: DeepSpeed's own classes, and models of what it has no class for.

A test compares these models with the keys that DeepSpeed asks a configuration for.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


CommunicationType = Annotated[Literal["fp32", "fp16", "bf16"] | None, BeforeValidator(_lower)]
Dtype: TypeAlias = (
    Literal["fp32", "float32", "float", "torch.float32"]
    | Literal["fp16", "float16", "half", "torch.float16"]
    | Literal["bf16", "bfloat16", "torch.bfloat16"]
    | None
)


class Block(BaseModel):
    """A part of a configuration for which DeepSpeed has no class; there it ignores keys that it does not know."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())


class OptimizerBlock(Block):
    """``optimizer``."""

    type: str
    params: dict[str, Any] = {}
    legacy_fusion: bool = False


class SchedulerBlock(Block):
    """``scheduler``. DeepSpeed ignores one without ``type`` and fails without ``params``."""

    type: str
    params: dict[str, Any]


class Autocast(Block):
    """``torch_autocast``."""

    enabled: bool = False
    dtype: Dtype = None
    lower_precision_safe_modules: list[str] | None = None


class ActivationCheckpointing(Block):
    """``activation_checkpointing``."""

    partition_activations: bool = False
    number_checkpoints: Positive | None = None
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    cpu_checkpointing: bool = False


class FlopsProfiler(Block):
    """``flops_profiler``."""

    enabled: bool = False
    recompute_fwd_factor: Rate = 0.0
    profile_step: Positive = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: Positive = 1
    detailed: bool = True
    output_file: str | None = None


class AsyncIO(Block):
    """``aio``."""

    block_size: Positive = 1048576
    queue_depth: Positive = 8
    intra_op_parallelism: Positive = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class Pipeline(Block):
    """``pipeline``."""

    stages: Positive | Literal["auto"] = "auto"
    partition: str = "best"
    seed_layers: bool = False
    activation_checkpoint_interval: Count = 0
    pipe_partitioned: bool = True
    grad_partitioned: bool = True
    use_reentrant: bool = True


class ParallelWrite(Block):
    """``checkpoint.parallel_write``."""

    pipeline_stage: bool = False


class CheckpointWriter(Block):
    """``checkpoint.writer``."""

    type: Annotated[Literal["mock", "python", "fast"], BeforeValidator(_lower)] = "fast"
    io_buffer_size: Positive = 67108864
    io_buffer_double: bool = True
    show_statistics: bool = False
    data_parallel: Annotated[Literal["replica", "socket", "machine"] | None, BeforeValidator(_lower)] = None
    decoupled: bool = False
    io_multiplier: Positive = 1


class Checkpoint(Block):
    """``checkpoint``."""

    tag_validation: Annotated[Literal["warn", "ignore", "fail"], BeforeValidator(_lower)] = "warn"
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: ParallelWrite = ParallelWrite()
    checkpoint_serialization: bool = True
    writer: CheckpointWriter | None = None


class DataTypes(Block):
    """``data_types``."""

    grad_accum_dtype: Dtype = None
    param_dtype: Dtype = None
    buffer_dtype: Dtype = None
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"


class DataEfficiency(Block):
    """``data_efficiency``; refused when it is enabled, so its parts are not looked at."""

    enabled: bool = False
    seed: int = 1234
    data_sampling: dict[str, Any] = {}
    data_routing: dict[str, Any] = {}


class Timers(Block):
    """``timers``."""

    throughput: DeepSpeedThroughputTimerConfig = DeepSpeedThroughputTimerConfig()


_EXPERT_KEYS: dict[str, Any] = {
    field.name: (get_type_hints(AutoEPConfig)[field.name], None) for field in fields(AutoEPConfig) if field.init
}
ExpertParallel = create_model("ExpertParallel", __base__=Block, **_EXPERT_KEYS)
"""``expert_parallel``, from DeepSpeed's dataclass."""


class Settings(Block):
    """The top level of a DeepSpeed configuration."""

    train_batch_size: Positive | None = None
    train_micro_batch_size_per_gpu: Positive | None = None
    gradient_accumulation_steps: Positive | None = None
    managed_gradient_accumulation: bool = True
    gradient_clipping: Rate = 1.0
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], BeforeValidator(_lower)] = "mean"
    communication_data_type: CommunicationType = None
    seq_parallel_communication_data_type: CommunicationType = None
    sequence_parallel_size: Positive = 1
    data_parallel_size: Positive = 1
    disable_allgather: bool = False
    use_data_before_expert_parallelism: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    allgather_size: Positive = 500000000
    vocabulary_size: Positive | None = None
    dataloader_drop_last: bool = False
    steps_per_print: Annotated[float, Field(gt=0)] | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)] | None = (
        None
    )
    datastates_ckpt: bool | dict[str, Any] | None = None

    optimizer: OptimizerBlock = None  # type: ignore[assignment]
    scheduler: SchedulerBlock = None  # type: ignore[assignment]
    zero_optimization: bool | DeepSpeedZeroConfig = False
    bf16: DeepSpeedBF16Config = DeepSpeedBF16Config()
    bfloat16: DeepSpeedBF16Config = DeepSpeedBF16Config()
    fp16: DeepSpeedFP16Config = DeepSpeedFP16Config()
    torch_autocast: Autocast = Autocast()
    data_types: DataTypes = DataTypes()
    tensor_parallel: TPTrainingConfig = TPTrainingConfig()
    expert_parallel: ExpertParallel = None  # type: ignore[assignment]
    pipeline: Pipeline = Pipeline()
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    checkpoint: Checkpoint = Checkpoint()
    aio: AsyncIO = AsyncIO()
    compile: CompileConfig = CompileConfig()
    hybrid_engine: HybridEngineConfig = HybridEngineConfig()
    data_efficiency: DataEfficiency = DataEfficiency()
    weight_quantization: WeightQuantConfig = WeightQuantConfig()
    autotuning: dict[str, Any] = {}
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    timers: Timers = Timers()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    csv_monitor: CSVConfig = CSVConfig()
    wandb: WandbConfig = WandbConfig()
    comet: CometConfig = CometConfig()


RANGES: dict[str, tuple[float, float]] = {
    "zero_optimization.allgather_bucket_size": (1, float("inf")),
    "zero_optimization.zero_hpz_partition_size": (1, float("inf")),
    "fp16.initial_scale_power": (0, 127),
    "fp16.hysteresis": (1, float("inf")),
    "tensor_parallel.autotp_size": (0, float("inf")),
    "comet.samples_log_interval": (1, float("inf")),
}
"""Ranges that DeepSpeed's classes do not check: outside it divides by zero, or never steps."""
