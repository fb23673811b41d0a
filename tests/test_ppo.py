"""ppo: advantages against a naive sum, cuts are not deaths, masks hold, every autoreset mode counts the same steps, same seed same bits."""
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings, strategies as hs
from atari_hrvq.core import BookError
from atari_hrvq.frames import RandomPolicy, collect, make_env
from atari_hrvq.ppo import LIVES, PPO, ActorCritic, ActorCriticConfig, PPOConfig, ReturnCounter, gae, life_returns, realised, rollout, sample, score_of_lives, train_ppo


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The tensors are tiny: threads cost more than they give."
    before = torch.get_num_threads()
    torch.set_num_threads(1); yield; torch.set_num_threads(before)


class Corridor(gym.Env):
    "Positions 0 to 4, action 2 steps right, 1 stays, 0 is illegal; the right end pays 1 and terminates, `limit` steps truncate."
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), gym.spaces.Discrete(3)

    def __init__(self, limit=9): self.limit, self.episodes = limit, 0
    def _see(self): return np.array([self.at, self.episodes], np.float32)
    def _info(self): return {'action_mask': np.array([0, 1, 1], np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.age, self.episodes = int(self.np_random.integers(3)), 0, 1 if seed is not None else self.episodes + 1
        return self._see(), self._info()

    def step(self, action):
        assert action != 0, 'an illegal action was played'
        self.at, self.age = self.at + (action == 2), self.age + 1
        return self._see(), float(self.at >= 4), self.at >= 4, self.age >= self.limit, self._info()


def corridors(n=3, mode=AutoresetMode.NEXT_STEP, limit=9): return gym.vector.SyncVectorEnv([lambda: Corridor(limit) for _ in range(n)], autoreset_mode=mode)


def small(actions=3, obs=2, seed=0, **kw):
    torch.manual_seed(seed)
    return ActorCritic(ActorCriticConfig(obs_shape=(obs,), actions=actions, hidden=16, **kw))


def critic_reads(policy, f):
    "Make the critic's value `f(obs)`, so that what it was asked about can be seen."
    actor = policy.forward
    policy.forward = lambda obs, mask=None: (actor(obs, mask)[0], f(obs))
    return policy


def gen(seed=0): return torch.Generator().manual_seed(seed)


# ---- advantages

@given(hs.integers(1, 12), hs.integers(0, 10_000), hs.floats(0, 1), hs.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_gae_is_the_naive_sum(T, seed, gamma, lam):
    "A_t = sum_k (gamma lam)^k delta_{t+k}, summed to the end of the episode, one row and one step at a time."
    rng = np.random.default_rng(seed)
    r, v, nxt = (rng.normal(size=(T, 2)) for _ in range(3))
    terminated, truncated = rng.random((T, 2)) < .2, rng.random((T, 2)) < .2
    want = np.zeros((T, 2))
    for b in range(2):
        for t in range(T):
            weight = 1.
            for k in range(t, T):
                want[t, b] += weight * (r[k, b] + gamma * nxt[k, b] * (not terminated[k, b]) - v[k, b])
                if terminated[k, b] or truncated[k, b]: break
                weight *= gamma * lam
    got = gae(*(torch.from_numpy(x) for x in (r, v, nxt, terminated, terminated | truncated)), gamma, lam)
    assert np.allclose(got, want, atol=1e-9)


def test_without_endings_lambda_one_is_the_discounted_return():
    r, v = torch.rand(6, 1), torch.rand(7, 1)
    no = torch.zeros(6, 1, dtype=torch.bool)
    want = sum(.9 ** k * r[k] for k in range(6)) + .9 ** 6 * v[6] - v[0]
    assert torch.allclose(gae(r, v[:-1], v[1:], no, no, .9, 1.)[0], want)


def test_a_cut_bootstraps_and_a_death_does_not():
    r, v, nxt, yes = torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1), 10.), torch.ones(1, 1, dtype=torch.bool)
    assert gae(r, v, nxt, yes, yes, .5, .9).item() == 0 and gae(r, v, nxt, ~yes, yes, .5, .9).item() == 5


# ---- rollout

def live(envs, policy, steps, seed=1): return rollout(envs, policy, steps, envs.reset(seed=seed), gen(seed))


def test_next_step_marks_the_reset_step_and_only_that():
    r = live(corridors(), small(), 60)
    assert r.obs.shape == (60, 3, 2) and r.actions.shape == r.valid.shape == r.next_values.shape == (60, 3)
    assert r.ended.any() and torch.equal(~r.valid[1:], r.ended[:-1]) and r.valid[0].all()


def test_next_step_goes_on_over_the_seam():
    "Two rollouts of 20 are one of 40, also when an episode ended on the last step of the first."
    whole = live(corridors(), policy := small(), 40)
    envs, g = corridors(), gen(1)
    first = rollout(envs, policy, 20, envs.reset(seed=1), g)
    second = rollout(envs, policy, 20, first.state, g)
    for k in ('obs', 'actions', 'rewards', 'valid', 'terminated', 'ended', 'values', 'next_values'):
        assert torch.equal(getattr(whole, k), torch.cat([getattr(first, k), getattr(second, k)])), k


@pytest.mark.parametrize('limit', [3, 9])
def test_the_next_value_belongs_to_the_same_episode(limit):
    "The critic says which episode (and place) it was asked about: what follows a valid step is that episode's next place."
    place = lambda obs: obs[:, 1] * 100 + obs[:, 0]
    r = live(corridors(limit=limit), critic_reads(small(), place), 50)
    here, after = r.values[r.valid], r.next_values[r.valid]
    assert (r.ended & ~r.terminated & r.valid).any()              # cuts occur
    assert torch.equal(after // 100, here // 100)
    assert torch.equal(after - here, (r.actions[r.valid] == 2).float())


class Drift(gym.vector.VectorEnv):
    "Everything is a torch tensor; observation t, reward 1; row b is cut after b + 2 steps."
    metadata = {'autoreset_mode': AutoresetMode.DISABLED}
    num_envs, single_action_space = 3, gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return torch.zeros(3, 2), {'action_mask': torch.tensor([[0, 1, 1]] * 3, dtype=torch.int8)}

    def step(self, actions):
        assert isinstance(actions, torch.Tensor)
        self.t += 1
        cut = torch.tensor([self.t >= b + 2 for b in range(3)])
        return torch.full((3, 2), float(self.t)), torch.ones(3), torch.zeros(3, dtype=torch.bool), cut, {'action_mask': torch.tensor([[0, 1, 1]] * 3, dtype=torch.int8)}


def test_torch_environments_stay_torch_and_cuts_bootstrap():
    r = live(Drift(), critic_reads(small(), lambda obs: obs[:, 0]), 6)
    assert r.valid.sum(0).tolist() == [2, 3, 4] and not r.terminated.any()
    a = gae(r.rewards, r.values, r.next_values, r.terminated, r.ended, 1., 1.)
    assert a[0].tolist() == [4., 6., 8.]                          # steps lived, and the value (= their number) of where the cut fell


def test_same_step_autoreset_is_one_sentence():
    with pytest.raises(BookError, match='autoreset'): live(corridors(mode=AutoresetMode.SAME_STEP), small(), 4)


def test_pictures_stay_uint8():
    class Pictures(Corridor):
        observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        def _see(self): return np.full((4, 84, 84), self.at * 50, np.uint8)
    torch.manual_seed(0)
    policy = ActorCritic(ActorCriticConfig(kind='cnn', obs_shape=(4, 84, 84), actions=3, hidden=16))
    envs = gym.vector.SyncVectorEnv([Pictures] * 2)
    r = live(envs, policy, 5)
    assert r.obs.dtype == torch.uint8 and r.obs.shape == (5, 2, 4, 84, 84)
    assert all(np.isfinite(list(PPO(policy).update(r, gen()).values())))


def test_rows_are_copies_also_of_an_environment_that_reuses_its_buffer():
    fresh, reused = (live(gym.vector.SyncVectorEnv([Corridor] * 2, copy=c), small(), 12) for c in (True, False))
    assert torch.equal(fresh.obs, reused.obs)


@pytest.mark.parametrize('shape', [(4, 96, 96), (4,), (4, 84)])
def test_a_cnn_of_other_frames_is_one_sentence(shape):
    with pytest.raises(BookError, match='84 x 84'): ActorCritic(ActorCriticConfig(kind='cnn', obs_shape=shape))


def test_observations_of_another_width_are_one_sentence():
    with pytest.raises(BookError, match=r'this policy sees observations of shape \[4\], got \[5\] a row'): ActorCritic(ActorCriticConfig(obs_shape=(4,)))(torch.randn(2, 5))


# ---- masks

def test_illegal_actions_are_never_drawn():
    policy = small(actions=18)
    torch.nn.init.normal_(policy.actor.weight, std=30.)           # a policy that would love to
    mask = (torch.rand(4000, 18, generator=gen(2)) < .3).to(torch.int8)
    mask[:, 5] = 1
    logits, _ = policy(torch.randn(4000, 2, generator=gen(3)) * 10, mask)
    assert all((mask.gather(1, sample(logits, gen(k))[:, None]) == 1).all() for k in range(5))
    assert (logits.softmax(-1)[mask == 0] == 0).all() and torch.isfinite(logits).all()


def test_masks_are_obeyed_in_every_rollout():
    r = live(corridors(8), small(), 200)                          # Corridor asserts as well
    assert (r.actions != 0).all()


def test_first_policy_is_uniform_over_legal_actions():
    logits, value = small()(torch.randn(5, 2), torch.tensor([[0, 1, 1]] * 5))
    assert torch.allclose(logits.softmax(-1), torch.tensor([0., .5, .5]).expand(5, 3)) and value.abs().max() == 0


def test_a_mixed_policy_keeps_every_legal_action_alive():
    "A tenth of uniform over two legal actions: a policy that is sure plays the other one in 1 of 20; illegal ones stay out, gradients stay finite, the best action stays the best."
    policy, mask = small(mix=.1), torch.tensor([[1, 0, 1]])
    with torch.no_grad(): policy.actor.bias.copy_(torch.tensor([200., 500., -200.]))
    logits = policy(torch.zeros(1, 2), mask)[0]
    assert torch.allclose(logits.softmax(-1), torch.tensor([[.95, 0., .05]]), atol=1e-6) and logits.argmax() == 0
    assert torch.allclose(logits.log_softmax(-1), logits, atol=1e-5)                    # they are log-probabilities already
    logits[0, 2].backward()
    assert torch.isfinite(policy.actor.bias.grad).all()
    assert set(sample(logits.detach().expand(4000, 3), gen()).tolist()) == {0, 2}
    with pytest.raises(BookError, match='a share from 0'): small(mix=1.)


# ---- update

def test_invalid_steps_change_nothing():
    "Whatever stands in an invalid row, the update ends in the same bits."
    def after(poison):
        policy = small()
        r = live(corridors(), policy, 40)
        if poison: r.rewards[~r.valid], r.actions[~r.valid], r.log_probs[~r.valid] = 1e6, 0, 7.
        PPO(policy).update(r, gen())
        return torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert torch.equal(after(False), after(True))


def test_invalid_steps_weigh_as_much_as_steps_left_out():
    "With shapes that stay, as a recorded graph needs them, an update is the one that leaves the invalid rows out."
    def after(keep):
        policy = small()
        r = live(corridors(), policy, 40)
        assert 0 < int((~r.valid).sum())
        r.rewards[~r.valid], r.log_probs[~r.valid] = 1e6, 7.
        valid = r.valid.flatten()
        order = torch.arange(int(valid.sum()) if keep else len(valid)).expand(3, -1)
        said = PPO(policy, PPOConfig(minibatches=1)).learn_from(r, order, valid if keep else None, 1)
        return torch.cat([p.detach().flatten() for p in policy.parameters()]), {k: float(v) for k, v in said.items()}
    (one, told), (two, also) = after(True), after(False)
    assert torch.allclose(one, two, atol=1e-5) and told == pytest.approx(also, rel=1e-3, abs=1e-5)


def test_same_seed_same_update():
    def after(seed):
        policy = small()
        PPO(policy).update(live(corridors(), policy, 30, seed), gen(seed))
        return torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert torch.equal(after(0), after(0)) and not torch.equal(after(0), after(1))


def test_the_clip_stops_the_push():
    "Beyond the clip, in the direction of the advantage, the policy term has no gradient; against it, it does."
    ppo, obs, mask = PPO(small()), torch.zeros(1, 2), torch.ones(1, 3)
    log_p = ppo.policy(obs, mask)[0].log_softmax(-1)[:, 1].detach()
    def push(old, advantage):
        loss = ppo.losses(obs, mask, torch.tensor([1]), old, torch.tensor([advantage]), torch.zeros(1))[0]['policy']
        return torch.autograd.grad(loss, ppo.policy.actor.bias, allow_unused=True)[0].abs().sum().item()
    assert push(log_p - .5, 1.) == 0 and push(log_p - .5, -1.) > 0 and push(log_p + .5, -1.) == 0 and push(log_p, 1.) > 0


@settings(max_examples=30, deadline=None)
@given(T=hs.integers(1, 40), seed=hs.integers(0, 999), gamma=hs.floats(0, 1))
def test_what_came_is_the_naive_sum(T, seed, gamma):
    rng = np.random.default_rng(seed)
    paid, lost = rng.choice([-1., 0., 1.], T), rng.random(T) < .2
    for t, g in enumerate(realised(paid, lost, gamma)):
        end = next((k for k in range(t, T) if lost[k]), T - 1)
        assert abs(g - sum(gamma ** (k - t) * paid[k] for k in range(t, end + 1))) < 1e-9


def test_real_returns_join_the_critic():
    policy = small(); r = live(corridors(), policy, 3)
    real = (torch.stack([r.obs[0, 0]] * 2), torch.tensor([3., 5.]), torch.tensor([0, 0]))
    before = [p.detach().clone() for p in policy.actor.parameters()]
    said = PPO(policy, PPOConfig(epochs=1, minibatches=1)).update(r, gen(), real)
    assert said['loss_real'] == pytest.approx(17)                         # (9 + 25) / 2 over their variance of 1; the new critic says 0
    alone = small(); PPO(alone, PPOConfig(epochs=1, minibatches=1)).update(r, gen())
    assert not torch.equal(policy.critic.bias, alone.critic.bias) and 'loss_real' not in PPO(alone).update(r, gen())
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.actor.parameters(), strict=True))
    with pytest.raises(BookError, match='12 minibatches needs a real state, got 2'): PPO(small()).update(r, gen(), real)


def test_played_steps_move_the_policy_as_far_as_the_clip_lets_them():
    policy = small(); r = live(corridors(), policy, 3); config = PPOConfig(epochs=1, minibatches=1, entropy_cost=0., lr=.01)
    obs, mask = torch.stack([r.obs[0, 0]] * 2), torch.stack([r.masks[0, 0]] * 2)
    legal = mask[0].nonzero()[:2, 0]
    logp = lambda: policy(obs, mask)[0].log_softmax(-1).gather(1, legal[:, None])[:, 0].detach()
    then = logp(); played = (obs, mask, legal, then, torch.tensor([2., 1.]))
    r.rewards = torch.zeros_like(r.rewards); r.values = torch.zeros_like(r.values); r.next_values = torch.zeros_like(r.next_values)      # dreams in which nothing happens
    ppo = PPO(policy, config)
    assert ppo.update(r, gen(), played=played)['loss_played'] == pytest.approx(-1.5)                    # the mean advantage, at a ratio of one
    for _ in range(60): ppo.update(r, gen(), played=played)
    ratio = (logp() - then).exp()
    assert ratio[0] > 1.15 and ratio.max() < 1.6, ratio                   # past 1.2 nothing pulls any more
    assert 'loss_played' not in PPO(small()).update(r, gen())
    with pytest.raises(BookError, match='12 minibatches needs a real state, got 2'): PPO(small()).update(r, gen(), played=played)


def test_update_without_a_valid_step_is_one_sentence():
    policy = small()
    r = live(corridors(), policy, 3)
    r.valid[:] = False
    with pytest.raises(BookError, match='no valid step'): PPO(policy).update(r, gen())


def test_returns_are_counted_once_an_episode():
    counter, r = ReturnCounter(3), live(corridors(), small(), 80)
    counter.add(r)
    assert len(counter.returns) == int((r.ended & r.valid).sum()) and set(counter.returns) <= {0., 1.}
    assert sum(counter.returns) == r.terminated.sum()             # each end of the corridor pays 1


# ---- the loop

def train(path=None, total=3 * 4 * 16 * 3, policy=None, config=None, **kw):
    policy = policy or small()
    history = train_ppo(corridors, policy, config or PPOConfig(lr=1e-3), total, horizon=16, chunk=4, checkpoint=path, **kw)
    return history, torch.cat([p.detach().flatten() for p in policy.parameters()])


class Killed(Exception): pass


def test_killed_and_resumed_is_bitwise_whole(tmp_path, monkeypatch):
    import atari_hrvq.ppo as module
    history, whole = train()
    count, real = [0], module.rollout

    def dying(*args):
        count[0] += 1
        if count[0] == 7: raise Killed                            # in the middle of the second chunk
        return real(*args)
    monkeypatch.setattr(module, 'rollout', dying)
    with pytest.raises(Killed): train(tmp_path / 'c.safetensors')
    monkeypatch.setattr(module, 'rollout', real)
    again, pieces = train(tmp_path / 'c.safetensors')
    assert torch.equal(whole, pieces) and again == history and count[0] == 7


def test_another_configuration_does_not_resume(tmp_path):
    "A checkpoint of another learning rate is not gone on with."
    fresh = train(config=PPOConfig(lr=5e-3))[1]
    train(tmp_path / 'c.safetensors')
    assert torch.equal(train(tmp_path / 'c.safetensors', config=PPOConfig(lr=5e-3))[1], fresh)


@pytest.mark.parametrize('options', [{}, {'objective': 'pmpo'}, {'objective': 'reinforce', 'epochs': 1}], ids=lambda o: o.get('objective', 'ppo'))
def test_it_learns_the_corridor(options):
    history, _ = train(total=12 * 4 * 16 * 3, policy=(p := small()), config=PPOConfig(lr=5e-3, **options))
    logits, _ = p(torch.tensor([[1., 5.], [3., 9.]]), torch.tensor([[0, 1, 1]] * 2))
    assert (logits.softmax(-1)[:, 2] > .8).all()
    assert len(history) == 12 and len(history[-1]['returns']) > len(history[0]['returns'])


def test_an_unknown_objective_is_one_sentence():
    with pytest.raises(BookError, match="objective.*'trpo'"): PPO(small(), PPOConfig(objective='trpo'))
    for wrong, expected in (({'gamma': 1.2}, 'gamma is from 0 to 1, got 1.2'), ({'clip': -.1}, 'clip is 0 or more'), ({'epochs': 0}, 'epochs is 1 or more, got 0')):
        with pytest.raises(BookError, match=f'PPOConfig: {expected}'): PPOConfig(**wrong)


def test_the_sign_alone_counts_in_pmpo():
    obs, mask, action, old, policy = torch.zeros(4, 2), torch.ones(4, 3), torch.tensor([0, 1, 2, 1]), torch.full((4,), -1.), small()
    policy.actor.bias.data = torch.tensor([1., 0., -2.])
    term = lambda objective, a: PPO(policy, PPOConfig(objective=objective)).losses(obs, mask, action, old, torch.tensor(a), torch.zeros(4))[0]['policy']
    a, larger = [1., -1., 2., -3.], [9., -.1, .2, -30.]
    assert term('pmpo', a) == term('pmpo', larger) and term('ppo', a) != term('ppo', larger) and term('pmpo', a) != term('pmpo', [-x for x in a])


def test_policy_saves_and_loads(tmp_path):
    policy = small()
    torch.nn.init.normal_(policy.actor.weight)
    policy.save_pretrained(tmp_path)
    x = torch.randn(4, 2)
    for a, b in zip(policy.eval()(x), ActorCritic.from_pretrained(tmp_path)(x), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('game', LIVES)
def test_lives_are_what_the_emulator_says(game):
    env = make_env(game); _, info = env.reset(seed=0); env.close()
    assert max(1, info['lives']) == LIVES[game]


def test_the_lives_of_whole_games_add_up_to_their_scores():
    played = collect('breakout', RandomPolicy('breakout'), 900, 0)
    ends = np.flatnonzero(played.terminated)
    whole = played.rewards[:ends[-1] + 1]
    assert len(ends) >= 3 and score_of_lives('breakout', life_returns(played)[:5 * len(ends)]) == pytest.approx(whole.sum() / len(ends))
