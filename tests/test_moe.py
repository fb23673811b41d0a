"""moe: the sorted form equals every-expert-on-every-token, the bias moves the load and not the gate, nobody loses gradients."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as hs
from atari_hrvq.core import BookError
from atari_hrvq.moe import MixtureOfExperts, MoEConfig, active_parameters, grouped

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The tensors are tiny: threads cost more than they give."
    before = torch.get_num_threads()
    torch.set_num_threads(1); yield; torch.set_num_threads(before)


def oracle(m, x):
    "Every expert on every token, gates of the unchosen 0; written apart from the module, from the equations of the chapter."
    c, flat = m.config, x.reshape(-1, x.shape[-1])

    def ffn(inner, outer):
        a, b = (flat @ inner).split(inner.shape[1] // 2, -1)
        return (a * torch.sigmoid(a) * b) @ outer
    y = 0.
    if c.experts == 1: y = ffn(m.inner[0], m.outer[0])
    else:
        s = 1 / (1 + torch.exp(-(flat.float() @ m.router.float())))
        best = torch.argsort(s.detach() + m.bias, dim=1, descending=True, stable=True)[:, :c.top_k]
        gate = torch.zeros_like(s)
        for place in best.T: gate[torch.arange(len(flat)), place] = 1
        gate = gate * s
        if c.top_k > 1: gate = gate / gate.sum(1, keepdim=True)
        for e in range(c.experts): y = y + gate[:, e, None] * ffn(m.inner[e], m.outer[e])
    if c.shared_hidden: y = y + ffn(m.shared_inner, m.shared_outer)
    return y.view(x.shape)


def build(seed=0, **kw):
    torch.manual_seed(seed)
    return MixtureOfExperts(MoEConfig(dim=8, hidden=6, **kw))


@given(experts=hs.integers(1, 6), top_k=hs.integers(1, 2), shared=hs.sampled_from([0, 4]), tokens=hs.integers(1, 40), seed=hs.integers(0, 99), banned=hs.integers(-1, 5))
@settings(max_examples=25, deadline=None)
def test_equals_the_masked_oracle_in_value_and_gradient(experts, top_k, shared, tokens, seed, banned):
    m = build(seed, experts=experts, top_k=min(top_k, experts), shared_hidden=shared).eval()
    if 0 <= banned < experts and experts > m.config.top_k: m.bias[banned] = -5.      # an expert that gets no token
    x = torch.randn(tokens, 8, requires_grad=True)
    ours, theirs, aim = m(x)[0], oracle(m, x), torch.randn(tokens, 8)
    assert torch.allclose(ours, theirs, atol=1e-5)
    targets = [x, *m.parameters()]
    a, b = (torch.autograd.grad((y * aim).sum(), targets, allow_unused=True) for y in (ours, theirs))
    for p, q in zip(a, b, strict=True): assert torch.allclose(p if p is not None else torch.zeros(()), q if q is not None else torch.zeros(()), atol=1e-4)
    if 0 <= banned < experts and experts > m.config.top_k: assert m(x)[1]['load'][banned] == 0 and a[1][banned].abs().max() == 0


def test_all_tokens_to_one_expert_and_one_token():
    x, inner, outer = torch.randn(5, 8), torch.randn(4, 8, 12), torch.randn(4, 6, 8)
    for e in range(4):
        h = x @ inner[e]
        want = (F.silu(h[:, :6]) * h[:, 6:]) @ outer[e]
        assert torch.allclose(grouped(x, torch.full((5,), e), inner, outer), want, atol=1e-5)
        assert torch.allclose(grouped(x[:1], torch.tensor([e]), inner, outer), want[:1], atol=1e-5)


def test_grouped_kernel_agrees_with_the_loop():
    "torch's grouped product, here in its CPU form: the same permutation and group ends as on the GPU, to bf16 accuracy."
    torch.manual_seed(0)
    x, inner, outer, chosen = torch.randn(40, 16), torch.randn(4, 16, 32) / 4, torch.randn(4, 16, 16) / 4, torch.randint(0, 4, (40,))
    chosen[chosen == 1] = 0
    try: got = grouped(x, chosen, inner, outer, torch._grouped_mm)
    except (RuntimeError, AttributeError, NotImplementedError) as e: pytest.skip(f'no grouped product here: {type(e).__name__}')
    want = grouped(x, chosen, inner, outer)
    assert (got - want).abs().max() < .03 * want.abs().max()


def test_every_parameter_gets_a_gradient():
    m = build(experts=4, top_k=1, shared_hidden=4).train()
    y, aux = m(torch.randn(200, 8))
    assert (aux['load'] > 0).all()
    (y.square().mean() + aux['balance_loss']).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


def test_bias_changes_the_choice_and_not_the_gate():
    m, x = build(experts=4).eval(), torch.randn(50, 8)
    affinity, before, _ = m.route(x)
    m.bias[3] = 5.
    again, choice, weight = m.route(x)
    assert (choice == 3).all() and not (before == 3).all()
    assert torch.equal(again, affinity) and torch.equal(weight[:, 0], affinity[:, 3])


def test_bias_moves_only_in_training_and_evens_the_load():
    m, x = build(experts=4, bias_rate=.02), torch.randn(400, 8)
    m.router.data[:, 0] = 0.; m.router.data[0, 0] = 3.
    x[:, 0] = x[:, 0].abs() + 1                                   # everybody likes expert 0
    m.eval(); start = m(x)[1]['load']
    assert start[0] > .9 and m.bias.abs().max() == 0
    m.train()
    for _ in range(200): m(x)
    m.eval()
    assert m(x)[1]['load'].max() < .40 and m.bias[0] < m.bias[1:].min()
    assert 'bias' in m.state_dict() and m.bias.requires_grad is False


def test_no_bias_no_movement():
    m = build(experts=4, bias_rate=0.).train()
    m(torch.randn(30, 8))
    assert m.bias.abs().max() == 0


def test_router_is_fp32_inside_autocast():
    m, x = build(experts=4).eval(), torch.randn(64, 8)
    want, wanted_choice, _ = m.route(x)
    with torch.autocast('cpu', torch.bfloat16):
        got, choice, _ = m.route(x)
        y = m(x)[0]
    assert got.dtype == torch.float32 and torch.equal(got, want) and torch.equal(choice, wanted_choice)
    assert y.shape == x.shape and torch.isfinite(y).all()


def test_one_expert_is_dense():
    m = build(experts=1)
    assert not hasattr(m, 'router') and not hasattr(m, 'bias')
    y, aux = m(torch.randn(2, 3, 8))
    assert y.shape == (2, 3, 8) and aux['load'].tolist() == [1.] and aux['balance_loss'] == 0


def test_without_a_report_the_output_is_the_same_and_training_reports_all_the_same():
    m, x = build(experts=3).eval(), torch.randn(9, 8)
    assert torch.equal(m(x, report=False)[0], m(x)[0]) and m(x, report=False)[1] is None and m.train()(x, report=False)[1]['load'].shape == (3,)


def test_load_is_a_share_and_the_balance_loss_is_least_when_even():
    m = build(experts=4, top_k=2, balance=1.).eval()
    aux = m(torch.randn(300, 8))[1]
    assert abs(aux['load'].sum().item() - 1) < 1e-6 and aux['balance_loss'].shape == ()
    m.router.data.zero_()                                         # even affinities: the loss is E * sum(load / E) = 1
    assert abs(m(torch.randn(300, 8))[1]['balance_loss'].item() - 1) < 1e-6


@pytest.mark.parametrize('wrong', [dict(experts=0), dict(experts=2, top_k=3), dict(experts=2, top_k=0)])
def test_impossible_configurations_are_one_sentence(wrong):
    with pytest.raises(BookError, match='top_k'): build(**wrong)


def test_vectors_of_another_width_are_one_sentence():
    for experts in (1, 3):
        with pytest.raises(BookError, match=r'these experts take vectors of 8 numbers, got x of shape \[5, 7\]'): MixtureOfExperts(MoEConfig(8, 6, experts=experts))(torch.randn(5, 7))


def test_active_parameters_by_hand():
    m = build(experts=4, top_k=2, shared_hidden=5)
    assert active_parameters(m) == 2 * 3 * 8 * 6 + 3 * 8 * 5 + 8 * 4
    assert active_parameters(build(experts=1)) == 3 * 8 * 6


def test_same_seed_same_bits():
    def train():
        m = build(7, experts=4, top_k=2, shared_hidden=4).train()
        opt = torch.optim.AdamW(m.parameters(), 1e-2)
        for k in range(8):
            torch.manual_seed(k); x = torch.randn(32, 8)
            y, aux = m(x); (y.square().mean() + aux['balance_loss']).backward(); opt.step(); opt.zero_grad()
        return torch.cat([v.flatten() for v in m.state_dict().values()])
    assert torch.equal(train(), train())
