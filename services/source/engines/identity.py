"""Names of engines, under which answers are stored and compared. A name holds every setting that changes an answer.

Settings that only move or speed up the computation, and so change no more than rounding, are listed here as neutral.
All others count, also those that this version does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

NEUTRAL_ENGINE_ARGS = frozenset(
    {
        *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_size_local"),
        *("data_parallel_address", "data_parallel_rpc_port", "data_parallel_backend", "distributed_executor_backend"),
        *("enable_expert_parallel", "max_parallel_loading_workers", "disable_custom_all_reduce", "master_addr"),
        *("master_port", "nnodes", "node_rank", "distributed_timeout_seconds", "numa_bind", "numa_bind_nodes"),
        *("numa_bind_cpus", "device_ids", "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override"),
        *("block_size", "swap_space", "cpu_offload_gb", "cpu_offload_params", "max_num_batched_tokens", "max_num_seqs"),
        *("max_num_scheduled_tokens", "max_num_active_seqs", "max_num_queued_reqs", "max_num_queued_tokens"),
        *("enable_chunked_prefill", "async_scheduling", "scheduling_policy", "stream_interval", "enforce_eager"),
        *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "served_model_name", "download_dir", "hf_token"),
        *("allowed_local_media_path", "safetensors_load_strategy", "safetensors_prefetch_num_threads"),
        *("safetensors_prefetch_block_size", "use_tqdm_on_load", "disable_log_stats", "enable_log_requests"),
        *("aggregate_engine_logging", "show_hidden_metrics_for_version", "otlp_traces_endpoint"),
        *("collect_detailed_traces", "kv_cache_metrics", "cudagraph_metrics", "enable_mfu_metrics", "log_level"),
        *("log_config_file", "logging_config", "shutdown_timeout", "ray_workers_use_nsight", "profiler_config"),
    }
)
_NEUTRAL_VARIABLES = re.compile(
    r"VLLM_(LOG|LOGGING|DEBUG|MEDIA|ASSETS|DP|RPC|NIXL|P2P|RAY|USAGE|CACHE|IMAGE|VIDEO|AUDIO|BUILD|DOCKER)_\w+"
    r"|VLLM_(API_KEY|HOST_IP|PORT|CONFIG_ROOT|XLA_CACHE_PATH|NO_USAGE_STATS|DO_NOT_TRACK|RINGBUFFER_WARNING_INTERVAL)"
    r"|VLLM_CPU_(KVCACHE_SPACE|OMP_THREADS_BIND|NUM_OF_RESERVED_CPU)"
    r"|VLLM_(WORKER_MULTIPROC_METHOD|ENABLE_V1_MULTIPROCESSING|V1_OUTPUT_PROC_CHUNK_SIZE|SERVER_DEV_MODE)"
    r"|VLLM_(EXECUTE_MODEL|ENGINE_ITERATION|WORKER_SHUTDOWN|ENGINE_READY)_TIMEOUT\w*|VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    r"|VLLM_(KEEP_ALIVE_ON_ENGINE_DEATH|SKIP_VERSION_SUFFIX|TARGET_DEVICE|ENABLE_STARTUP_PLAN|CONFIGURE_LOGGING)"
    r"|VLLM_(LOOPBACK_IP|PROCESS_NAME_PREFIX|NCCL_SO_PATH|SKIP_P2P_CHECK|DISABLE_COMPILE_CACHE|ALLOW_LONG_MAX_MODEL_LEN)"
)


def counted_arguments(engine_args: Mapping[str, Any], neutral_values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine arguments that may change an answer, without those set to their value in `neutral_values`."""
    return {
        key: value
        for key, value in engine_args.items()
        if key not in NEUTRAL_ENGINE_ARGS and value is not None and neutral_values.get(key) != value
    }


def counted_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for vLLM that may change an answer."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith("VLLM_") and not _NEUTRAL_VARIABLES.fullmatch(name)
    }


def engine_name(kind: str, counted: Mapping[str, Any], version: str = "") -> str:
    """Return a name such as "vllm 0.32.0 (load_format=dummy)"; stored windows carry it without the version."""
    shown = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for key, value in sorted(counted.items())
    }
    settings = ", ".join(f"{key}={value}" for key, value in shown.items())
    return " ".join([kind, *([version] if version else []), *([f"({settings})"] if settings else [])])
