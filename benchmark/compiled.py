"""cup.py with a compiled update: the same algorithm, settings and files, and a faster run.

    python benchmark/compiled.py --env-id push-wall-v2             # takes cup.py's arguments
    python benchmark/compiled.py --env-id push-wall-v2 --sources   # SAC

The update is cup.py's own, compiled by torch.compile as one graph. For that, this file replaces
the critics by layers that compute both twins at once, and the optimisers by an Adam that the
compiler can trace. Compiling takes about a minute and a C++ compiler. Rounding differs from
cup.py's, so two long runs with the same seed differ. A checkpoint continues only with the script
that wrote it.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup


class TwinLinear(nn.Module):
    """Two linear layers side by side, x (2, batch, fan_in) -> (2, batch, fan_out)."""
    def __init__(self, first: nn.Linear, second: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([first.weight.T, second.weight.T]).detach())
        self.bias = nn.Parameter(torch.stack([first.bias, second.bias]).detach().unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2] == 1:  # the output Q: a batched product of width 1 is slow
            return self.bias + (x * self.weight.mT).sum(dim=2, keepdim=True)
        return torch.baddbmm(self.bias, x, self.weight)


class TwinCritic(nn.Module):
    """The networks of a cup.TwinCritic: obs (..., obs_dim), action (..., action_dim) -> (2, ...)"""
    def __init__(self, plain: cup.TwinCritic):
        super().__init__()
        self.standardize = plain.standardize
        twins = zip(plain.q1, plain.q2, strict=True)
        self.net = nn.Sequential(
            *(TwinLinear(a, b) if isinstance(a, nn.Linear) else a for a, b in twins)
        )

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.standardize(obs), action], dim=-1)
        both = x.reshape(-1, x.shape[-1]).expand(2, -1, -1)  # (2, batch, obs_dim + action_dim)
        return self.net(both).view(2, *x.shape[:-1])

    min_q = cup.TwinCritic.min_q


class Adam(nn.Module):
    """torch.optim.Adam in a form that torch.compile can trace, with the same numbers."""
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        super().__init__()
        self.learnt, self.lr = list(parameters), lr  # a plain list: not part of the state
        self.mean = nn.ParameterList(torch.zeros_like(x) for x in self.learnt)
        self.mean_square = nn.ParameterList(torch.zeros_like(x) for x in self.learnt)
        # betas^t after t steps, in float64 as torch.optim.Adam. A product at each step is fast: a
        # power would be computed again in every iteration of the compiled loop over the weights.
        betas = torch.tensor([0.9, 0.999], dtype=torch.float64, device=self.learnt[0].device)
        self.register_buffer("betas", betas)
        self.register_buffer("decay", torch.ones_like(betas))
        self.requires_grad_(False)

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor]) -> None:
        self.decay.mul_(self.betas)
        bias, bias_square = 1 - self.decay
        rate, eps = self.lr * bias_square.sqrt() / bias, 1e-8 * bias_square.sqrt()
        moments = zip(self.learnt, gradients, self.mean, self.mean_square, strict=True)
        for parameter, gradient, mean, mean_square in moments:
            mean.lerp_(gradient, 0.1)
            mean_square.lerp_(gradient.square(), 0.001)
            parameter.sub_(rate * mean / (mean_square.sqrt() + eps))


class Agent(cup.Agent):
    """cup.Agent with the same initial networks and a compiled `update`."""
    def __init__(self, args: cup.Args, obs_dim: int, action_dim: int, sources, device="cpu"):
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise cup.UserError("torch.compile needs a C++ compiler, such as g++") from error
        super().__init__(args, obs_dim, action_dim, sources, device)
        self.critic, self.target_critic = TwinCritic(self.critic), TwinCritic(self.target_critic)
        self.actor_optimizer = Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.q_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)
        self.optimizers = []  # these optimisers are modules, so `state_dict` has them already
        torch._dynamo.config.trace_autograd_ops = True  # the update takes gradients
        torch._inductor.config.fallback_random = True  # the random numbers of an eager update
        mode = "reduce-overhead" if args.cuda else "default"  # CUDA graphs
        self.update = torch.compile(self.update, fullgraph=True, mode=mode)

    def minimize(self, loss: Tensor, optimizer: Adam) -> None:
        optimizer.step(torch.autograd.grad(loss, optimizer.learnt))


if __name__ == "__main__":
    cup.main(agent_class=Agent)
