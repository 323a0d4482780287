"""For Ray Serve LLM: the next request goes to the replica whose KV cache is freest, by what vLLM last said of it.

Both classes are named in serve.most-free-kv.yaml. Ray asks each replica every second; of replicas within a tenth of
each other the one with the shorter queue is taken.
"""

from ray.serve.llm.deployment import LLMServer
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class KVUsageServer(LLMServer):
    """The server of a replica, which tells Ray how full the KV cache is: 0 to 1."""

    kv_cache_usage = 0.0

    async def start(self) -> None:
        """Start the engine and listen to its statistics."""
        from vllm.v1.metrics.loggers import AggregateStatLoggerBase  # here alone: routers need no vLLM

        server = self

        class Usage(AggregateStatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0) -> None:
                if scheduler_stats is not None:
                    server.kv_cache_usage = scheduler_stats.kv_cache_usage

            def log_engine_initialized(self) -> None:
                pass

        await super().start()
        self.engine._engine_client.logger_manager.stat_loggers.append(Usage())

    async def record_routing_stats(self) -> dict[str, object]:
        """What Ray hands to the router of this replica."""
        return {**await super().record_routing_stats(), "kv_cache_usage": self.kv_cache_usage}


class MostFreeKV(FIFOMixin, RequestRouter):
    """Replicas in the order of their KV cache's use; a new one, which has said nothing yet, has an empty one."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the freest first; within a group Ray takes the shortest queue."""
        groups: dict[float, list[RunningReplica]] = {}
        for replica in candidate_replicas:
            usage = (replica.routing_stats or {}).get("kv_cache_usage", 0.0)
            groups.setdefault(round(usage, 1), []).append(replica)
        return [groups[usage] for usage in sorted(groups)]
