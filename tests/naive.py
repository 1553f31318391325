"""A second opinion: language models from the papers' formulas, token by token, on raw weights.

It shares no code with the package. It reads the tensors of an official checkpoint by their names
and its config.json, runs in the tensors' own dtype (give it float64), and is as slow as it is
simple. Formulas: shared by the papers' code; see the sources named in mambapy's modules.
"""

import math

import torch
import torch.nn.functional as F


def lm(weights, config, tokens):
    """Logits (b, l, rows) of an official model."""
    x = weights["backbone.embedding.weight"][tokens]
    for i in range(config["n_layer"]):
        part = below(weights, f"backbone.layers.{i}.")
        mixer = below(part, "mixer.")
        u = rms(x, part["norm.weight"])
        if i in config.get("attn_layer_idx", []):
            x = x + attention(mixer, u, **config["attn_cfg"])
        else:
            options = dict(config["ssm_cfg"])
            kind = {"Mamba1": mamba, "Mamba2": mamba2, "Mamba3": mamba3}
            x = x + kind[options.pop("layer", "Mamba1")](mixer, u, **options)
        if config.get("d_intermediate"):
            y, gate = (rms(x, part["norm2.weight"]) @ part["mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (y * F.silu(gate)) @ part["mlp.fc2.weight"].T
    return rms(x, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T


def below(weights, prefix):
    return {n.removeprefix(prefix): T for n, T in weights.items() if n.startswith(prefix)}


def rms(x, weight=None, eps=1e-5):
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def conv(w, x):
    """Each channel's last four (or so) inputs, weighted."""
    k = w["conv1d.weight"].shape[-1]
    padded = F.pad(x, (0, 0, k - 1, 0))
    taps = [padded[:, j : j + x.shape[1]] * w["conv1d.weight"][:, 0, j] for j in range(k)]
    return sum(taps) + w["conv1d.bias"]


def mamba(w, u, d_state=16, dt_rank="auto", **_):
    x, z = (u @ w["in_proj.weight"].T).chunk(2, -1)
    x = F.silu(conv(w, x))
    low, B, C = (x @ w["x_proj.weight"].T).split(
        [w["dt_proj.weight"].shape[1], d_state, d_state], -1
    )
    dt = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    A, h, ys = -w["A_log"].exp(), 0, []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1) + w["D"] * x
    return (y * F.silu(z)) @ w["out_proj.weight"].T


def mamba2(w, u, d_state=128, headdim=64, ngroups=1, **_):
    heads = len(w["A_log"])
    inner, groups = heads * headdim, ngroups * d_state
    z, xBC, dt = (u @ w["in_proj.weight"].T).split([inner, inner + 2 * groups, heads], -1)
    x, B, C = F.silu(conv(w, xBC)).split([inner, groups, groups], -1)
    x = x.unflatten(-1, (heads, headdim))
    # Heads of one group share B and C, neighbours first.
    B, C = (
        T.unflatten(-1, (ngroups, d_state)).repeat_interleave(heads // ngroups, 2) for T in (B, C)
    )
    dt = F.softplus(dt + w["dt_bias"])
    A, h, ys = -w["A_log"].exp(), 0, []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1) + w["D"][:, None] * x[:, t])
    y = torch.stack(ys, 1).flatten(2) * F.silu(z)
    y = rms(y.unflatten(-1, (ngroups, -1))).flatten(2) * w["norm.weight"]
    return y @ w["out_proj.weight"].T


def mamba3(
    w, u, d_state=128, headdim=64, ngroups=1, rope_fraction=0.5, is_mimo=False, mimo_rank=4, **_
):
    heads, r = len(w["dt_bias"]), mimo_rank if is_mimo else 1
    inner, angles = heads * headdim, int(d_state * rope_fraction) // 2
    sizes = [inner, inner, r * ngroups * d_state, r * ngroups * d_state, heads, heads, heads]
    parts = (u @ w["in_proj.weight"].T).split([*sizes, angles], -1)
    z, x, B, C, dt, a, trap, theta = parts
    z, x = (T.unflatten(-1, (heads, headdim)) for T in (z, x))
    keys = []
    for T, name in ((B, "B"), (C, "C")):
        rows = rms(T.unflatten(-1, (r, ngroups, d_state)), w[f"{name}_norm.weight"])
        rows = rows.repeat_interleave(heads // ngroups, 3)
        keys.append(rows + w[f"{name}_bias"].transpose(0, 1))
    K, Q = keys
    dt = F.softplus(dt + w["dt_bias"])
    a = -torch.where(a >= 0, 1 + a, 1 / (1 - a)).clamp(min=1e-4)
    lam = torch.sigmoid(trap)
    ones = torch.ones(heads, 1, headdim, dtype=u.dtype)
    mx, mz, mo = (w.get(f"mimo_{n}", ones).transpose(0, 1) for n in "xzo")
    phase, h, ys = 0, 0, []
    last = torch.zeros(())
    for t in range(u.shape[1]):
        phase = phase + math.pi * torch.tanh(theta[:, t, None]) * dt[:, t, :, None]
        k, q = (turn(T[:, t], phase[:, None], angles, pairs=not is_mimo) for T in (K, Q))
        value = mx * x[:, t, None]
        now = torch.einsum("brhp,brhn->bhpn", value, k)
        decay = torch.exp(dt[:, t] * a[:, t])[:, :, None, None]
        d, l = dt[:, t, :, None, None], lam[:, t, :, None, None]
        h = decay * h + (1 - l) * d * decay * last + l * d * now
        last = now
        y = torch.einsum("bhpn,brhn->brhp", h, q) + w["D"][:, None] * value
        ys.append((mo * y * F.silu(mz * z[:, t, None])).sum(1))
    return torch.stack(ys, 1).flatten(2) @ w["out_proj.weight"].T


def turn(T, phase, angles, pairs):
    """Rotate pairs of channels: neighbours, or those half the state apart."""
    cos, sin = phase.cos(), phase.sin()
    n = T.shape[-1]
    first = torch.arange(angles) * 2 if pairs else torch.arange(angles)
    second = first + 1 if pairs else first + n // 2
    out = T.clone()
    out[..., first] = T[..., first] * cos - T[..., second] * sin
    out[..., second] = T[..., first] * sin + T[..., second] * cos
    return out


def attention(w, u, num_heads, head_dim, num_heads_kv=None, d_conv=0, rotary_emb_dim=0, **_):
    kv = num_heads_kv or num_heads
    qkv = u @ w["in_proj.weight"].T
    qkv = conv(w, qkv) if d_conv else qkv
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([num_heads, kv, kv], 2)
    half = rotary_emb_dim // 2
    rates = torch.tensor([10000 ** (-i / half) for i in range(half)], dtype=u.dtype)
    out = torch.zeros_like(q)
    for h in range(num_heads):
        g = h * kv // num_heads
        for t in range(u.shape[1]):
            scores = []
            for s in range(t + 1):
                # Only the distance counts: turn the key back by it.
                angle = (s - t) * rates
                key = k[:, s, g].clone()
                a, b = k[:, s, g, :half], k[:, s, g, half : 2 * half]
                key[:, :half] = a * angle.cos() - b * angle.sin()
                key[:, half : 2 * half] = a * angle.sin() + b * angle.cos()
                scores.append((q[:, t, h] * key).sum(-1) / math.sqrt(head_dim))
            p = torch.softmax(torch.stack(scores, -1), -1)
            out[:, t, h] = torch.einsum("bs,bsp->bp", p, v[:, : t + 1, g])
    return out.flatten(2) @ w["out_proj.weight"].T
