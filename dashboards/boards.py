"""The dashboards: runs, their workers, and the service."""

from __future__ import annotations

from mobula.dashboards.panels import Board, Panel

CHOSEN = 'method=~"$method", run=~"$run"'
EACH = "{{run}} {{trial}}"
RATE = "[$__rate_interval]"


def of_runs(gauge: str, *own: str, where: str = "") -> str:
    """The series of a gauge of mobula.metrics, one a run and value of its own tags.

    A run that was built again, in another process, leaves two series for some seconds: the larger.
    """
    chosen = f"{CHOSEN}, {where}" if where else CHOSEN
    return f"max by ({', '.join(['run', 'trial', *own])}) (ray_mobula_{gauge}{{{chosen}}})"


def served(metric: str, labels: str) -> str:
    """A gauge of Ray Serve, summed by labels."""
    return f'sum by ({labels}) ({metric}{{application=~"$application"}})'


def rates(counter: str, labels: str) -> str:
    """A counter of Ray Serve a second, summed by labels."""
    return f'sum by ({labels}) (rate({counter}{{application=~"$application"}}{RATE}))'


def quantiles(buckets: str, labels: str, legend: str) -> dict[str, str]:
    """50, 95 and 99 % of a histogram of Ray Serve, by labels."""
    return {
        f"{legend} {q:.0%}": f"histogram_quantile({q}, {rates(buckets, f'le, {labels}')})"
        for q in (0.5, 0.95, 0.99)
    }


VARIABLES = {
    "method": "label_values(ray_mobula_iterations, method)",
    "run": 'label_values(ray_mobula_iterations{method=~"$method"}, run)',
}

RUNS = Board(
    "mobula-runs",
    "mobula: runs",
    [
        Panel(
            "Runs that are on",
            "Runs and trials that publish. One that has ended, or whose process is gone, leaves after 20 s.",
            {"runs": f"count({of_runs('iterations')})"},
            kind="stat",
            width=6,
            height=4,
        ),
        Panel(
            "Environment steps a second",
            "Of all chosen runs together.",
            {"steps/s": f"sum({of_runs('env_steps_per_second')})"},
            kind="stat",
            width=6,
            height=4,
        ),
        Panel(
            "Longest silence",
            "Seconds since the last iteration of the run that has been silent longest.",
            {"silence": f"max({of_runs('idle_seconds')})"},
            unit="s",
            kind="stat",
            width=6,
            height=4,
        ),
        Panel(
            "Recoveries",
            "Times that the chosen runs went on from a checkpoint after a loss.",
            {"recoveries": f"sum({of_runs('recoveries')})"},
            kind="stat",
            width=6,
            height=4,
        ),
        Panel(
            "Return",
            "Mean return of the last episodes, in training and in evaluation. Flat from the start: look at the learner's metrics below."
            " Falling after it rose: the step size is too large, or the policy has collapsed.",
            {
                f"{EACH} {{{{metric}}}}": of_runs(
                    "score", "metric", where='metric=~"return|evaluation_return"'
                )
            },
        ),
        Panel(
            "Reward a step",
            "Of the last iteration, for tasks that never end too.",
            {EACH: of_runs("score", where='metric="reward_per_step"')},
        ),
        Panel(
            "The method's own measure",
            "What the method is judged by where that is not its return: exploitability, a gap, a score.",
            {
                f"{EACH} {{{{metric}}}}": of_runs(
                    "score", "metric", where='metric!~"return|evaluation_return|reward_per_step"'
                )
            },
        ),
        Panel(
            "Learner's metrics",
            "Losses, norms, step sizes, entropies, by name. A series that ends while its run goes on has become NaN or infinite.",
            {f"{EACH} {{{{metric}}}}": of_runs("learner", "metric", where='metric=~"$metric"')},
        ),
        Panel(
            "Environment steps",
            "Since the start, with those before a resume. A step back: the run went on from its last checkpoint.",
            {EACH: of_runs("env_steps")},
        ),
        Panel(
            "Iterations",
            "Since the start. Flat while the run is on: see the silence above, and the workers.",
            {EACH: of_runs("iterations")},
        ),
    ],
    {**VARIABLES, "metric": 'label_values(ray_mobula_learner{run=~"$run"}, metric)'},
)

WORKERS = Board(
    "mobula-workers",
    "mobula: workers",
    [
        Panel(
            "Environment steps a second",
            "Wall clock: sampling, learning and everything else of the iteration.",
            {EACH: of_runs("env_steps_per_second")},
        ),
        Panel(
            "Seconds of an iteration",
            "Sampling, learning, and the rest (evaluation, checkpoints, tracking, RLlib). Mostly sampling: more env runners. Mostly"
            " learning: more learners, or a GPU. Much rest: rarer checkpoints and evaluations, longer iterations.",
            {f"{EACH} {{{{part}}}}": of_runs("iteration_seconds", "part")},
            unit="s",
            stack=True,
        ),
        Panel(
            "Env runners: steps a second",
            "While they sample. All samples wait for the slowest: one far below the others stands on a slow or crowded machine. 0: it"
            " returned nothing, it is dead or hangs.",
            {
                f"{EACH} runner {{{{runner}}}}": of_runs("env_runner_steps_per_second", "runner"),
            },
        ),
        Panel(
            "Env runners: slowest to fastest",
            "1: all alike. Below a half: half of the others' time is spent waiting.",
            {
                EACH: f"min by (run, trial) ({of_runs('env_runner_steps_per_second', 'runner')})"
                f" / max by (run, trial) ({of_runs('env_runner_steps_per_second', 'runner')})"
            },
            unit="percentunit",
        ),
        Panel(
            "Env runners: healthy",
            "Beside how many there should be. Fewer for a minute: they are being started again. For longer: the cluster has no room for"
            " them, see Ray's own dashboard.",
            {
                f"{EACH} {{{{state}}}}": of_runs("env_runners", "state"),
            },
        ),
        Panel(
            "Restarts and recoveries",
            "Env runners that were started again, and times that the run went on from a checkpoint. Every few minutes: the environment"
            " crashes, or memory runs out; see the Ray logs of the actor.",
            {
                f"{EACH} restarts": of_runs("env_runner_restarts"),
                f"{EACH} recoveries": of_runs("recoveries"),
            },
        ),
        Panel(
            "Share of learning",
            "In the time of an iteration.",
            {
                EACH: of_runs("iteration_seconds", where='part="learning"')
                + f" / sum by (run, trial) ({of_runs('iteration_seconds', 'part')})"
            },
            unit="percentunit",
        ),
        Panel(
            "Env runners of RLlib's own algorithms: steps a second",
            "Counted by RLlib in each runner's process.",
            {
                "{{NodeAddress}} {{WorkerId}}": "sum by (NodeAddress, WorkerId)"
                f" (rate(ray_rllib_env_runner_num_env_steps_sampled_counter_total{RATE}))"
            },
        ),
        Panel(
            "Population shards: seconds until they answer",
            "The slowest and the mean. A slowest far above the mean: a crowded machine, or shards of unequal size.",
            {
                f"{EACH} {{{{group}}}} slowest": "max by (run, trial, group)"
                f" ({of_runs('shard_seconds', 'group', 'shard')})",
                f"{EACH} {{{{group}}}} mean": "avg by (run, trial, group)"
                f" ({of_runs('shard_seconds', 'group', 'shard')})",
            },
            unit="s",
        ),
        Panel(
            "Population shards: at work",
            "How many there are, and how many have not answered yet. One that stays at work while the others wait hangs, or waits for a"
            " core.",
            {f"{EACH} {{{{group}}}} {{{{state}}}}": of_runs("shards", "group", "state")},
        ),
    ],
    VARIABLES,
)

ROUTE, BY_ROUTE = "{{application}} {{route}}", "application, route"
DEPLOYMENT, BY_DEPLOYMENT = "{{application}} {{deployment}}", "application, deployment"

SERVICE = Board(
    "mobula-service",
    "mobula: service",
    [
        Panel(
            "Requests a second",
            "By route, at the HTTP proxies.",
            {ROUTE: rates("ray_serve_num_http_requests_total", BY_ROUTE)},
        ),
        Panel(
            "Errors a second",
            "By status code at the proxies, and exceptions in the deployments. 4xx are the clients'; 5xx and exceptions: see the logs of"
            " the replicas.",
            {
                f"{ROUTE} {{{{error_code}}}}": rates(
                    "ray_serve_num_http_error_requests_total", f"{BY_ROUTE}, error_code"
                ),
                f"{DEPLOYMENT} exceptions": rates("ray_serve_deployment_error_counter_total", BY_DEPLOYMENT),
            },
        ),
        Panel(
            "Latency, end to end",
            "Seen by the proxies, with the wait for a free replica.",
            quantiles("ray_serve_http_request_latency_ms_bucket", BY_ROUTE, ROUTE),
            unit="ms",
        ),
        Panel(
            "Latency of the deployments",
            "In the replica alone. Near the end-to-end latency: the model is slow; a larger batch or a GPU. Far below it: requests wait;"
            " more replicas.",
            quantiles("ray_serve_deployment_processing_latency_ms_bucket", BY_DEPLOYMENT, DEPLOYMENT),
            unit="ms",
        ),
        Panel(
            "Requests on their way",
            "In the replicas, and waiting for one. A queue that grows: more replicas, or fewer clients.",
            {
                f"{DEPLOYMENT} in replicas": served("ray_serve_replica_processing_queries", BY_DEPLOYMENT),
                f"{DEPLOYMENT} waiting": served("ray_serve_deployment_queued_queries", BY_DEPLOYMENT),
            },
        ),
        Panel(
            "Healthy replicas",
            "Fewer than asked for: they do not start, or fail their health checks; `serve status` says why.",
            {DEPLOYMENT: served("ray_serve_deployment_replica_healthy", BY_DEPLOYMENT)},
        ),
    ],
    {"application": "label_values(ray_serve_deployment_request_counter_total, application)"},
)

BOARDS = (RUNS, WORKERS, SERVICE)
