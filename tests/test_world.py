"""world and dream: alignment on a game with known answers, causality, cache, seeds, endings."""
import copy
import json
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from atari_hrvq.core import BookError, FitConfig, count_parameters, fit
from atari_hrvq.dream import Contexts, DreamEnv, DreamVectorEnv, events_ahead
from atari_hrvq.frames import Episodes
from atari_hrvq.moe import active_parameters
from atari_hrvq.world import LevelHeads, Tokens, WorldConfig, WorldModel, evenly, f1, token_batches, tokenise

SMALL = dict(grid=1, levels=2, codes=8, cell_dim=4, dim=32, heads=2, experts=(1, 2), windows=(3, 6), hidden=32, shared_hidden=8, cell_hidden=16, corrupt=.1)


def toy(n=1200, seed=0):
    """A game of one cell: code 0..6 counts up by one after action 3 (RIGHT) and stays otherwise; the step that leaves 6 earns 1 and
    starts at 0 again; action 1 (FIRE) in state 4 ends the episode, which always begins in state 2 (level-1 code 5 marks the first frame)."""
    rng = np.random.default_rng(seed)
    state, first, rows, episode = 2, True, [], 0
    for _ in range(n):
        a = int(rng.choice([0, 1, 3], p=[.3, .1, .6]))
        reward = float(state == 6 and a == 3); done = state == 4 and a == 1
        rows.append((state, 5 if first else 1, a, reward, done, episode))
        state, first = ((state + 1) % 7 if a == 3 else state), False
        if done: state, first, episode = 2, True, episode + 1
    s, m, a, r, d, e = (np.asarray(x) for x in zip(*rows, strict=True))
    return Tokens(torch.from_numpy(np.stack([s, m], 1)[:, None].astype(np.uint8)), torch.from_numpy(a), torch.from_numpy(r.astype(np.float32)), torch.from_numpy(d), torch.from_numpy(e))


def make(seed=0):
    torch.manual_seed(seed)
    model = WorldModel(WorldConfig(games=('breakout',), **SMALL))
    torch.nn.init.normal_(model.heads.codebook)
    return model


@pytest.fixture(scope='module')
def learnt():
    model = make()
    fit(model, token_batches({'breakout': toy()}, 32, 8), FitConfig(steps=260, lr=4e-3, warmup=20))
    return model


def perfect(model, data):
    "Accuracy of the next state, of the reward, and F1 of endings, teacher forced, over windows of unseen play."
    codes, actions, rewards, done, game, following, known = token_batches({'breakout': data}, 512, 8)(np.random.default_rng(9))
    with torch.no_grad(): out = model(codes, actions, game, following)
    return (float((out.logits[0].argmax(-1) == following[..., 0])[known].float().mean()), float((model.reward.sign(out.reward).round() == rewards).float().mean()),
            f1(out.proceed < 0, done))


def test_alignment_on_a_game_with_known_answers(learnt):
    assert min(perfect(learnt, toy(seed=1))) > .98


@pytest.mark.parametrize('wrong', ['reward', 'action', 'done'])
def test_a_shift_by_one_is_noticed(learnt, wrong):
    d = toy(seed=1); roll = lambda x: torch.roll(x, 1)
    shifted = Tokens(d.codes, roll(d.actions) if wrong == 'action' else d.actions, roll(d.rewards) if wrong == 'reward' else d.rewards, roll(d.done) if wrong == 'done' else d.done, d.episode)
    assert min(perfect(learnt, shifted)) < .97


def test_the_contrast_needs_the_actions(learnt):
    "Told other actions than were played, the model picks the wrong frames."
    codes, actions, _, _, game, following, known = token_batches({'breakout': toy(seed=1)}, 64, 8)(np.random.default_rng(0))
    with torch.no_grad():
        h, z = learnt(codes, actions, game, following).hidden, learnt.vectors(following)
        torch.manual_seed(0); right = learnt.contrast.loss(h, z, actions, known)
        torch.manual_seed(0); wrong = learnt.contrast.loss(h, z, actions[torch.randperm(64)], known)
    assert right < wrong


def test_a_reward_may_be_paid_by_its_power():
    head, bins = make().reward, make().reward.bins
    logits = torch.full((3, 1, len(bins)), -1e9)
    for row, b in enumerate((len(bins) // 2, len(bins) // 2 + 2, len(bins) // 2 - 3)): logits[row, 0, b] = 0.
    points = head.points(logits)
    assert torch.allclose(head.power(logits, 0.), head.sign(logits)) and torch.allclose(head.power(logits, 1.), points)
    assert torch.allclose(head.power(logits, .5), points.sign() * points.abs().sqrt()) and head.power(logits, .5)[0] == 0


def test_endings_weigh_what_they_are_told_to():
    model, batch = make().eval(), token_batches({'breakout': toy()}, 16, 8)(np.random.default_rng(0))
    def loss(weight):
        model.config.ending = weight; torch.manual_seed(0)
        with torch.no_grad(): return model.loss(*batch)
    (one, parts), (five, same) = loss(1.), loss(5.)
    assert float(five - one) == pytest.approx(4 * float(parts['proceed']), rel=1e-3) and parts['proceed'] == same['proceed'] > 0


def test_corruption_stays_in_training_and_below_its_share():
    torch.manual_seed(0)
    model = make(); batch = token_batches({'breakout': toy()}, 64, 8)(np.random.default_rng(0))
    changed = (model.corrupted(batch[0], batch[4]) != batch[0]).float().mean()
    assert 0 < changed < model.config.corrupt
    model.eval(); torch.manual_seed(1); a = model.loss(*batch)[1]['level_0']; torch.manual_seed(2); b = model.loss(*batch)[1]['level_0']
    model.train(); c = model.loss(*batch)[1]['level_0']
    assert a == b != c


def test_corruption_takes_codes_of_another_window_of_the_same_game():
    model, game = WorldModel(WorldConfig(games=('pong', 'breakout'), **{**SMALL, 'corrupt': 1.})), torch.tensor([0, 1, 1, 0, 1])
    own = torch.arange(5).view(5, 1, 1, 1).expand(5, 40, 1, 2)                                      # every code says whose window it is
    torch.manual_seed(0)
    taken = [model.corrupted(own, game) for _ in range(30)]
    assert all(len(row.unique()) <= 2 for t in taken for row in t)                                  # its own and those of one other
    assert {(i, j) for t in taken for i, row in enumerate(t) for j in row.unique().tolist()} == {(i, j) for i in range(5) for j in range(5) if game[i] == game[j]}
    assert torch.equal(model.corrupted(own[:2], game[:2]), own[:2])                                 # a window alone in its game stays as it is


def test_scheduled_frames_are_what_the_model_makes_of_those_before():
    torch.manual_seed(0)
    model = WorldModel(WorldConfig(**{**SMALL, 'corrupt': 0., 'scheduled': 1.}))
    codes, actions, _, _, game, following, _ = token_batches({'breakout': toy()}, 64, 8)(np.random.default_rng(0))
    bias = model.blocks[1].experts.bias.clone()
    def drifted(passes): torch.manual_seed(3); return model.drifted(codes, actions, game, passes, temperature=0.)
    with torch.no_grad(): said = model.eval()(codes, actions, game, following).logits[0].argmax(-1)[:, :-1]        # the likeliest codes of level 0
    once = model.train() and drifted(1)
    assert model.training and torch.equal(bias, model.blocks[1].experts.bias)                                     # balance counts what is learned, once
    assert once.dtype == codes.dtype and torch.equal(once[:, :2], codes[:, :2])
    other = (once != codes)[..., 0]
    assert torch.equal(once[:, 1:][other[:, 1:]][:, 0], said[other[:, 1:]].to(once.dtype))
    share = other.any(-1)[:, 2:].float().mean(1)
    assert share.max() > .6 and share.min() < .4                                                                  # each window has a share of its own
    assert not torch.equal(once, drifted(2))                                                                      # the second pass sees the first one's


def test_scheduled_frames_stay_in_training():
    model = make(); model.config.corrupt, model.config.scheduled = 0., 1.
    batch = token_batches({'breakout': toy()}, 16, 8)(np.random.default_rng(0))
    def loss(scheduled): model.config.scheduled = scheduled; torch.manual_seed(4); return float(model.loss(*batch)[1]['level_0'])
    with torch.no_grad():
        assert loss(1.) != loss(0.)
        model.eval()
        assert loss(1.) == loss(0.)


def test_age_counts_from_the_last_lost_life_or_first_frame():
    flags = lambda *at: torch.tensor([i in at for i in range(8)])
    t = Tokens(torch.zeros(8, 1, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.long), torch.zeros(8), flags(2), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]))
    assert t.age().tolist() == [0, 1, 2, 0, 1, 0, 1, 2]                                  # a life is lost with step 2, an episode begins at 5
    assert t.stops().nonzero().flatten().tolist() == [2, 4, 7]


def test_late_in_a_life_is_drawn_as_often_as_early():
    ages = np.repeat([0, 40, 200], [9_000, 900, 100]); rows = np.arange(10_000)
    drawn = ages[evenly(rows, ages)(6_000, np.random.default_rng(0))]
    assert all(abs((drawn == a).mean() - 1 / 3) < .03 for a in (0, 40, 200))
    few = evenly(rows, ages, least=101)(1_000, np.random.default_rng(0))
    assert (ages[few] < 200).all() and len(few) == 1_000                                 # too few to learn from again and again
    assert len(evenly(rows[:5], ages[:5])(7, np.random.default_rng(0))) == 7


def test_windows_by_age_come_from_the_newest():
    d = {'breakout': toy(3000)}; since = 1500
    d['breakout'].codes[:, 0, 0] = torch.arange(3000) % 251
    def starts(**kw):
        codes, *_ = token_batches(d, 400, 6, {'breakout': since}, **kw)(np.random.default_rng(0))
        return codes[:, 0, 0, 0]
    assert torch.equal(starts(), starts(by_age=0.)) and not torch.equal(starts(), starts(by_age=1.))
    marked = d['breakout']; marked.codes[:, 0, 0] = (torch.arange(3000) >= since).to(torch.uint8)
    assert starts(by_age=1.).all() and not starts().all()


def test_dreams_begin_late_in_a_life_as_often_as_early():
    n = 4_000; done = torch.zeros(n, dtype=torch.bool); done[[*range(39, 2_000, 40), *range(2_249, n, 250)]] = True        # lives of 40 steps, then of 250
    d = Tokens(torch.zeros(n, 1, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), torch.zeros(n), done, torch.zeros(n, dtype=torch.long))
    d.actions = torch.arange(n)                                                                                     # they say where a context lies
    def late(by_age): return float((d.age()[Contexts({'breakout': d}, ['breakout'], 8, hot=.5, by_age=by_age)(2_000, np.random.default_rng(0))[1][:, -1] + 1] >= 180).mean())
    assert late(0.) < .2 < late(.5) < late(1.)


def test_a_cut_is_not_an_ending():
    flags = lambda *at: np.isin(np.arange(5), at)
    episodes = Episodes('pong', 'atari100k', np.zeros((5, 84, 84), np.uint8), np.zeros(5, np.int64), np.zeros(5, np.float32), flags(2), flags(3), flags(1), np.array([0, 0, 0, 1, 2]), np.zeros((5, 128), np.uint8), np.arange(3))
    tokens = tokenise(SimpleNamespace(encode=lambda x: torch.zeros(len(x), 1, 2, dtype=torch.uint8)), episodes)
    assert tokens.done.tolist() == [False, True, True, False, False]


def test_a_reward_is_told_before_it_comes(learnt):
    "In state 5, two steps from the reward, a reward is likelier one and two steps ahead than in state 1."
    d = toy(seed=1); codes, actions, _, _, game, following, _ = token_batches({'breakout': d}, 400, 8)(np.random.default_rng(1))
    with torch.no_grad(): p = learnt(codes, actions, game, following).reward.softmax(-1)[..., learnt.reward.bins > 0].sum(-1)   # [B, T, A]
    state = codes[..., 0, 0]
    assert p[state == 5][:, 1:3].sum(1).mean() > .2 + p[state == 1][:, 1:3].sum(1).mean()


def test_nothing_is_asked_after_an_ending():
    d = toy()
    _, _, _, done, _, following, known = token_batches({'breakout': d}, 200, 8)(np.random.default_rng(0))
    assert done.any() and not known[done].any() and known[:, :-1][~done[:, :-1]].all()
    assert (following[known][:, 0, 1] == 1).all()        # the marker of a first frame is never a target


def test_windows_stay_inside_episodes():
    d = toy()
    codes, *_ = token_batches({'breakout': d}, 300, 6)(np.random.default_rng(0))
    assert (codes[:, 1:, 0, 1] == 1).all() and (codes[:, 0, 0, 1] == 5).any()


def test_windows_that_live_hold_no_ending_before_their_last_step():
    d, length = toy(), 4
    d.done[[7, 8, 30]] = True
    episode, done = d.episode.tolist(), d.done.tolist()
    inside = [s for s in range(len(d) - length + 1) if episode[s] == episode[s + length - 1]]
    assert d.windows(length).tolist() == inside
    alive = d.windows(length, alive=True).tolist()
    assert alive == [s for s in inside if not any(done[s:s + length - 1])] and 0 < len(alive) < len(inside)


@pytest.mark.parametrize('batch', [1, 5])
@pytest.mark.parametrize('windows', [(1, 1), (2, 20), (20, 3)])
def test_cached_equals_uncached(windows, batch):
    torch.manual_seed(0)
    model = WorldModel(WorldConfig(games=('pong', 'breakout'), **{**SMALL, 'windows': windows})).eval()
    torch.nn.init.normal_(model.heads.codebook)
    codes, actions, game = torch.randint(0, 8, (batch, 14, 1, 2)), torch.randint(0, 18, (batch, 14)), torch.arange(batch) % 2
    with torch.no_grad(): whole, _ = model.trunk(model.vectors(codes), actions, game)
    cache = model.start(codes[:, :3], actions[:, :2], game)
    for t in range(2, 14):
        cache.history = model.recent(model.vectors(codes[:, :t + 1]))[:, -1]
        model.step(cache, actions[:, t], (0., 0.))
        assert (cache.hidden - whole[:, t]).abs().max() < 1e-5


def test_rows_of_every_age_equal_dreams_of_their_own():
    "Rows that began anew at different steps, in rings that have turned, give what each gives alone."
    torch.manual_seed(0)
    model = WorldModel(WorldConfig(games=('pong', 'breakout'), **SMALL)).eval()
    torch.nn.init.normal_(model.heads.codebook)
    codes, actions, game = torch.randint(0, 8, (3, 14, 1, 2)), torch.randint(0, 18, (3, 30)), torch.tensor([0, 1, 0])
    together, began = model.start(codes[:, :5], actions[:, :4], game), [0, 0, 0]
    alone = [model.start(codes[[i], :5], actions[[i], :4], game[[i]]) for i in range(3)]
    for t in range(25):
        for row, when, length in ((1, 6, 3), (2, 11, 9), (1, 19, 2)):
            if t == when:
                start = codes[[row], :length], actions[[row], :length - 1], game[[row]]
                model.restart(together, torch.tensor([row]), *start); alone[row] = model.start(*start)
        out = model.step(together, actions[:, t], (0., 0.))
        for i, cache in enumerate(alone):
            one = model.step(cache, actions[[i], t], (0., 0.))
            assert (cache.hidden[0] - together.hidden[i]).abs().max() < 1e-5 and torch.equal(one.codes[0], out.codes[i]), (t, i)


def envs(model, n=4, **kw):
    return DreamVectorEnv(model, Contexts({'breakout': toy(400)}, ['breakout'], 4), n, **{'horizon': 6, 'temperature': (.5, 0.), **kw})


def test_dreams_follow_the_rules_of_the_game(learnt):
    e = envs(learnt, 32, horizon=6)
    _, info = e.reset(seed=0)
    for _ in range(6):
        before, over = e.cache.codes[:, 0, 0].clone(), e.over.clone()
        _, reward, terminated, _, info = e.step(np.full(32, 3))
        live = ~over.numpy()
        assert ((before + 1) % 7 == e.cache.codes[:, 0, 0])[live].float().mean() > .95
        assert np.abs(reward - (before == 6).numpy())[live].max() < .2 and not terminated[live].any()


def test_ending_by_action(learnt):
    e = envs(learnt, 64, horizon=3); e.reset(seed=0)
    four = (e.cache.codes[:, 0, 0] == 4).numpy()
    _, _, terminated, _, _ = e.step(np.ones(64, int))
    assert four.any() and terminated[four].mean() > .9 and terminated[~four].mean() < .1


def test_same_seed_same_dream_and_single_agrees_with_vector(learnt):
    contexts = Contexts({'breakout': toy(400)}, ['breakout'], 4)
    single, vector = DreamEnv(learnt, contexts, 'breakout', horizon=6, temperature=(.5, 0.)), envs(learnt, 1)
    a, _ = single.reset(seed=3); b, _ = vector.reset(seed=3)
    assert np.array_equal(a, b[0])
    for t in range(6):
        a, ra, ta, ua, _ = single.step(3); b, rb, tb, ub, _ = vector.step([3])
        assert np.array_equal(a, b[0]) and ra == rb[0] and ta == tb[0] and ua == ub[0]


def test_rows_that_ended_wait_for_a_reset(learnt):
    e = envs(learnt, 3, horizon=2); e.reset(seed=0)
    for _ in range(2): _, _, terminated, truncated, _ = e.step([3, 3, 3])
    assert (terminated | truncated).all()
    _, reward, terminated, truncated, _ = e.step([3, 3, 3])
    assert not reward.any() and not terminated.any() and not truncated.any()
    e.reset(options={'reset_mask': np.array([True, False, False])})
    _, _, terminated, truncated, _ = e.step([3, 0, 0])
    assert e.over.tolist() == [False, True, True] and e.age[0] == 1 and not (terminated | truncated).any()


def test_foresight_pays_the_mean_of_all_that_was_said(learnt):
    "Eq. foresight with numbers: states that expect `h[i] * (j + 1) / 10` after j steps; rows that begin anew forget. In a dream: its first step pays the mean of what the last real state and the first dreamt one say."
    from atari_hrvq.dream import Foresight
    world = SimpleNamespace(reward=SimpleNamespace(ahead=3))
    class Linear(Foresight):
        def said(self, hidden, rows=slice(None)): return hidden * torch.tensor([1., 2., 3.]) / 10
    f, h = Linear(world, torch.tensor([[1.], [2.]])), torch.tensor([[4.], [4.]])
    first, second = f(h), f(h)
    assert torch.allclose(first, torch.tensor([(.2 + .4) / 2, (.4 + .4) / 2]))                # said one step ahead by the real state, and now
    assert torch.allclose(second, torch.tensor([(.3 + .8 + .4) / 3, (.6 + .8 + .4) / 3]))
    f.restart(torch.tensor([1]), torch.tensor([[0.]]))
    assert torch.allclose(f(h), torch.tensor([(1.2 + .8 + .4) / 3, (0. + .4) / 2]))
    e, plain = envs(learnt, 8, foresight=True), envs(learnt, 8)
    e.reset(seed=0); plain.reset(seed=0)
    said = lambda h, j: Foresight(learnt, h[:1]).said(h)[:, j].numpy()
    states, paid = [e.cache.hidden], []
    for t in range(4):
        live = ~e.over.numpy()
        obs, reward, *_ = e.step(np.full(8, 3)); other, now, *_ = plain.step(np.full(8, 3)); states.append(e.cache.hidden)
        n = min(learnt.config.ahead, t + 2)
        assert np.array_equal(obs, other) and live.any()                                     # only the pay differs
        assert np.allclose(reward, live * sum(said(states[-1 - j], j) for j in range(n)) / n, atol=1e-6) and np.allclose(now, live * said(states[-1], 0), atol=1e-6)
        paid.append(np.abs(reward - now).max())
    assert max(paid) > 1e-3
    e.reset(options={'reset_mask': np.arange(8) == 0})
    start = e.cache.hidden[:1].clone()
    reward = e.step(np.full(8, 3))[1]
    assert np.isclose(reward[0], (said(start, 1) + said(e.cache.hidden[:1], 0))[0] / 2, atol=1e-6)
    root = Foresight(learnt, start, .5, torch.tensor([4.])).said(start)
    assert torch.allclose(root, learnt.reward.power(learnt.reward(start)[:, :, None], .5) / 2, atol=1e-6)     # in units of 4 points
    with pytest.raises(BookError, match='power is 0 or more, and more than 0 only with foresight'): envs(learnt, 8, power=.5)


def test_a_long_dream_keeps_its_rules_in_memory_of_fixed_size(learnt):
    long = envs(learnt, 2, horizon=150, temperature=(0., 0.)); long.reset(seed=1)
    states = []
    for _ in range(140):
        long.step([3, 3]); states.append(long.cache.codes[:, 0, 0].clone())
    s = torch.stack(states)
    assert ((s[:-1] + 1) % 7 == s[1:]).float().mean() > .95
    assert [k.shape[2] for k, _ in long.cache.rings] == list(learnt.config.windows) and long.cache.least == 143


def test_save_and_load(tmp_path, learnt):
    again = WorldModel.from_pretrained(learnt.save_pretrained(tmp_path / 'w'))
    assert perfect(again, toy(seed=1)) == perfect(learnt, toy(seed=1)) and again.config == learnt.config


def test_models_from_before_wide_heads_load_as_they_were_made(tmp_path):
    narrow = WorldModel(WorldConfig(**SMALL, head_hidden=0, cell_blocks=0)).eval(); folder = narrow.save_pretrained(tmp_path / 'old')
    said = json.loads((folder / 'config.json').read_text()); assert said.pop('head_hidden') == said.pop('cell_blocks') == 0
    (folder / 'config.json').write_text(json.dumps(said))
    again, x = WorldModel.from_pretrained(folder), torch.randn(3, 1, SMALL['cell_hidden'])
    assert again.config.head_hidden == again.config.cell_blocks == len(again.heads.blocks) == 0 and again.heads.free[0][0].out_features == SMALL['cell_hidden'] and torch.equal(again.heads.free[0](x), narrow.heads.free[0](x))
    wide = WorldModel(WorldConfig(**SMALL))
    assert wide.heads.free[0][0].out_features == WorldConfig().head_hidden == WorldModel.from_pretrained(wide.save_pretrained(tmp_path / 'new')).config.head_hidden


def test_cell_blocks_say_nothing_before_they_learn_and_are_the_same_for_every_cell():
    config = {**SMALL, 'grid': 3}; torch.manual_seed(0); plain = LevelHeads(WorldConfig(**config, cell_blocks=0)); deep = LevelHeads(WorldConfig(**config, cell_blocks=2))
    assert deep.load_state_dict(plain.state_dict(), strict=False).missing_keys and len(deep.blocks) == 2
    h, recent = torch.randn(6, SMALL['dim']), torch.randn(6, 3, 9, SMALL['cell_dim'])
    assert torch.equal(deep.features(h, recent), plain.features(h, recent))
    for b in deep.blocks: torch.nn.init.normal_(b.down.weight)
    f = plain.features(h, recent); assert not torch.allclose(deep.features(h, recent), f)
    assert torch.allclose(deep.features(h, recent)[:, [4, 2]], deep.blocks(f[:, [4, 2]]), atol=1e-5)                    # cell by cell
    assert torch.allclose(deep.features(h[:2], recent[:2]), deep.features(h, recent)[:2], atol=1e-4)                      # a few dreams go another way


def mixed(**options):
    "A small model in which each game has words of its own, and windows of three games mixed."
    torch.manual_seed(0); model = WorldModel(WorldConfig(**{**SMALL, 'grid': 3, 'corrupt': 0.}, game_heads=True, **options))
    torch.nn.init.normal_(model.heads.codebook)
    return model, torch.randint(0, 8, (5, 6, 9, 2)), torch.randint(0, 18, (5, 6)), torch.tensor([2, 0, 1, 0, 2]), torch.randint(0, 8, (5, 6, 9, 2))


def test_each_game_has_words_of_its_own(tmp_path, monkeypatch):
    model, codes, actions, game, after = mixed(); model.eval()
    with torch.no_grad():
        whole = model(codes, actions, game, after).logits
        for i in range(5): assert all(torch.allclose(a[i:i + 1], b, atol=1e-5) for a, b in zip(whole, model(codes[i:i + 1], actions[i:i + 1], game[i:i + 1], after[i:i + 1]).logits, strict=True))
        again = WorldModel.from_pretrained(model.save_pretrained(tmp_path / 'own')).eval()(codes, actions, game, after).logits
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)                       # the way of a graph: every game's words are asked about every row
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, [x.unflatten(0, (5, 6)) for x in model.heads(model.trunk(model.vectors(codes), actions, game)[0].flatten(0, 1), model.recent(model.vectors(codes)).flatten(0, 1), after.flatten(0, 1), game.repeat_interleave(6))], strict=True))
        monkeypatch.undo()
        torch.nn.init.normal_(model.heads.each[1].free[0][2].weight); other = model(codes, actions, game, after).logits[0]
    assert [torch.equal(a, b) for a, b in zip(whole[0], other, strict=True)] == [True, True, False, True, True]
    twin = copy.deepcopy(model).heads.each; assert twin[1].of is twin[0]
    one = WorldModel(WorldConfig(**{**SMALL, 'grid': 3}))
    words = sum(count_parameters(getattr(one.heads, k)) for k in ('scene', 'chosen', 'free', 'shift'))
    assert active_parameters(model) == active_parameters(one) and count_parameters(model) - count_parameters(one) == 2 * words


def test_dreams_of_mixed_games_are_those_of_each_alone():
    model, codes, actions, game, _ = mixed(); model.eval(); cold, names = (0., 0.), ('codes', 'reward', 'proceed', 'points')
    cache, first = model.start(codes, actions[:, :5], game), torch.tensor([3, 1, 0, 4, 5])
    together = [model.step(cache, first, cold) for _ in range(4)]
    for i in range(5):
        alone = model.start(codes[i:i + 1], actions[i:i + 1, :5], game[i:i + 1])
        for step in together:
            mine = model.step(alone, first[i:i + 1], cold)
            assert all(torch.allclose(getattr(mine, k)[0].float(), getattr(step, k)[i].float(), atol=1e-4) for k in names)


def test_only_the_words_of_the_games_in_a_batch_learn():
    model, codes, actions, game, after = mixed(asked=.5); model.train(); game = game.clamp(max=1)
    window = (codes, actions, torch.zeros(5, 6), torch.zeros(5, 6, dtype=torch.bool), game, after, torch.ones(5, 6, dtype=torch.bool))
    model.loss(*window)[0].backward()
    learned = [(grad := h.free[0][2].weight.grad) is not None and bool(grad.abs().sum() > 0) for h in model.heads.each]
    assert learned == [True, True, False]


def test_asking_fewer_of_the_cells_that_stay_is_the_same_loss_on_average():
    torch.manual_seed(0); model = WorldModel(WorldConfig(**{**SMALL, 'grid': 3, 'experts': (1, 1), 'corrupt': 0.}, cell_blocks=1, games=('pong',))).train()     # a router would shift its biases from call to call
    torch.nn.init.normal_(model.heads.codebook); torch.nn.init.normal_(model.heads.blocks[0].down.weight)
    codes = torch.randint(0, 8, (4, 7, 9, 2)); after = torch.where(torch.rand(4, 7, 9, 1) < .2, torch.randint(0, 8, codes.shape), codes)
    window = (codes, torch.randint(0, 18, (4, 7)), torch.zeros(4, 7), torch.zeros(4, 7, dtype=torch.bool), torch.zeros(4, dtype=torch.long), after, torch.rand(4, 7) < .8)
    def asked(share):
        model.config.asked = share; model.zero_grad(); loss, parts = model.loss(*window); loss.backward()
        return torch.stack([parts['level_0'], parts['level_1'], parts['reward']]).detach(), model.heads.local.grad.clone()
    (whole, slope), (all_, same) = asked(1.), asked(1 - 1e-9)                                       # every cell is drawn: the same sum by the other way
    assert torch.allclose(whole, all_, atol=1e-5) and torch.allclose(slope, same, atol=1e-5) and model.graphs is False
    some = torch.stack([asked(.25)[0] for _ in range(200)])
    assert (some[:, :2].std(0) > .01).all() and ((some.mean(0) - whole)[:2].abs() < 4 * some[:, :2].std(0) / 200 ** .5).all() and torch.equal(some[0, 2], whole[2])
    assert torch.allclose(model.eval().loss(*window)[1]['level_0'], whole[0], atol=1e-5)                  # what is measured asks all
    with pytest.raises(BookError, match='above 0 and up to 1, got 0'): model.train(); asked(0)


def test_resume_is_bitwise(tmp_path):
    class Killed(Exception): pass
    def kill(k, _):
        if k == 5: raise Killed
    batch, c = token_batches({'breakout': toy(300)}, 8, 6), FitConfig(steps=9, checkpoint_s=0.)
    whole = make(); fit(whole, batch, c)
    with pytest.raises(Killed): fit(make(), batch, c, checkpoint=tmp_path / 'c', callback=kill)
    resumed = make(1); fit(resumed, batch, c, checkpoint=tmp_path / 'c')
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def step_at(model, temperature):
    cache = model.start(torch.zeros(1, 3, 1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    return model.step(cache, torch.zeros(1, dtype=torch.long), temperature)


@pytest.mark.parametrize('call, message', [
    (lambda m: envs(m).step([3] * 4), 'call reset first'),
    (lambda m: (e := envs(m), e.reset(seed=0), e.step([3, 3, 17, 3])), 'action 17 is illegal in dream 2'),
    (lambda m: m.start(torch.zeros(1, 9, 1, 2, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, dtype=torch.long)), 'got 9 frames and 9 actions'),
    (lambda m: m.start(torch.zeros(1, 3, 4, 2, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long)), r'codes of 1 cells and 2 levels, got them of shape \(1, 3, 4, 2\): they are of another tokenizer'),
    (lambda m: m(torch.zeros(1, 3, 1, 3, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 1, 3, dtype=torch.uint8)), 'another tokenizer'),
    (lambda m: WorldModel(WorldConfig(experts=(1, 2), windows=(4,))), 'one entry a layer'),
    (lambda m: WorldModel(WorldConfig(heads=3, dim=32)), 'multiple of twice the heads'),
    (lambda m: WorldModel(WorldConfig(heads=4, dim=12)), 'multiple of twice the heads'),
    (lambda m: step_at(m, (0.,)), 'one temperature for each of 2 levels'),
    (lambda m: step_at(m, (0., 0., 0.)), 'one temperature for each of 2 levels'),
    (lambda m: envs(m).reset(seed=-1), 'a seed is 0 or more'),
    (lambda m: envs(m, 0), 'num_envs must be at least 1'),
    (lambda m: Contexts({'tetris': toy(60)}, ['breakout'], 4), "unknown game of the world model 'tetris'"),
    (lambda m: Contexts({'breakout': toy(60)}, ['breakout'], 1), 'at least 2 frames'),
    (lambda m: Contexts({'breakout': toy(60)}, ['breakout'], 4, hot=2.), 'hot is a share'),
    (lambda m: Contexts({'breakout': toy(60)}, ['breakout'], 4, reach=0), 'reach at least 1'),
    (lambda m: Contexts({'breakout': toy(60)}, ['breakout'], 4, by_age=1.5), 'by_age is a share of the contexts'),
    (lambda m: token_batches({'breakout': toy(60)}, 2, 4, by_age=-.5), 'by_age is a share of the windows'),
    (lambda m: WorldModel(WorldConfig(**{**SMALL, 'scheduled': 2.})).drifted(torch.zeros(1, 4, 1, 2, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, dtype=torch.long)), 'scheduled is from 0 to 1, got 2.0'),
    (lambda m: WorldConfig(**{**SMALL, 'asked': 1.5}), 'asked is from 0 to 1, got 1.5'),
    (lambda m: WorldConfig(**{**SMALL, 'asked': 0.}), 'asked and grid are above 0'),
    (lambda m: WorldConfig(**{**SMALL, 'windows': (3, 0)}), 'every layer has an expert and sees a step'),
    (lambda m: WorldConfig(**{**SMALL, 'head_hidden': -1}), 'head_hidden is 0 or more'),
    (lambda m: envs(m).reset() and envs(m).render(), 'without its tokenizer')])
def test_bad_input(learnt, call, message):
    with pytest.raises(BookError, match=message): call(learnt)


def test_a_compiled_step_is_the_same_step():
    import shutil
    if not shutil.which('g++'): pytest.skip('no C++ compiler')
    torch.manual_seed(0)
    make = lambda: WorldModel(WorldConfig(games=('pong', 'breakout'), **{**SMALL, 'experts': (2,), 'windows': (3,)})).eval()       # a minute of compiling a layer
    model = make(); torch.nn.init.normal_(model.heads.codebook)
    quick = make(); quick.load_state_dict(model.state_dict()); quick.faster()
    codes, actions, game = torch.randint(0, 8, (2, 5, 1, 2)), torch.randint(0, 18, (2, 30)), torch.arange(2)
    caches = [m.start(codes, actions[:, :4], game) for m in (model, quick)]
    for t in range(20):
        one, two = (m.step(c, actions[:, t], (.5, 0.), torch.Generator().manual_seed(t)) for m, c in zip((model, quick), caches, strict=True))
        assert torch.equal(one.codes, two.codes) and torch.allclose(one.reward, two.reward, atol=1e-5) and torch.allclose(caches[0].hidden, caches[1].hidden, atol=1e-5)


def test_hot_starts_lie_before_a_reward_or_an_ending():
    d, n = toy(600), 4
    contexts = Contexts({'breakout': d}, ['breakout'], n, hot=1., reach=5)
    events = (d.rewards.abs() > 0) | d.done
    assert len(contexts.hot['breakout']) and all(bool(events[s + n - 1:s + n - 1 + 5].any()) for s in contexts.hot['breakout'])
    only = Tokens(d.codes, d.actions, torch.zeros_like(d.rewards), d.done, d.episode)                # a game in which nothing is won, only lost
    assert 0 < len(Contexts({'breakout': only}, ['breakout'], n, reach=5).hot['breakout']) < len(contexts.plain['breakout'])


def test_a_dream_of_its_own_has_the_starts_it_was_given(learnt):
    contexts = Contexts({'breakout': toy(400)}, ['breakout'], 4, hot=.3, reach=2, recent={'breakout': 300})
    mine = DreamEnv(learnt, contexts, 'breakout', temperature=(0., 0.)).dreams.contexts
    assert all(np.array_equal(getattr(mine, k)['breakout'], getattr(contexts, k)['breakout']) for k in ('plain', 'hot')) and mine.share == .3


def test_starts_drawn_one_at_a_time_are_hot_as_often_as_was_asked_and_of_every_game():
    data = {g: toy(400) for g in ('breakout', 'pong')}
    contexts = Contexts(data, ['breakout', 'pong'], 4, hot=.5, reach=1); contexts.plain = {g: np.array([7]) for g in data}; contexts.hot = {g: np.array([90]) for g in data}
    rng, hot = np.random.default_rng(0), data['pong'].codes[90:94]
    drawn = [contexts(1, rng) for _ in range(400)]
    assert not torch.equal(data['pong'].codes[7:11], hot)
    assert abs(np.mean([torch.equal(codes[0], hot) for codes, *_ in drawn]) - .5) < .08 and abs(np.mean([int(game) for *_, game in drawn]) - .5) < .08


def test_events_are_those_from_the_first_dreamt_step_on_until_the_game_is_over():
    "Against a search step by step; endings in the first dreamt step are among them, and what happens in the next episode is not."
    d, C, reach = toy(300), 4, 12
    starts, ahead = events_ahead(d, C, reach)
    inside = [s for s in range(len(d) - C + 1) if d.episode[s] == d.episode[s + C - 1] and not d.done[s:s + C - 1].any() and s + C - 1 + reach <= len(d)]
    assert starts.tolist() == inside
    for i, s in enumerate(starts):
        seen = {'reward': False, 'end': False}
        for t in range(s + C - 1, s + C - 1 + reach):
            if d.episode[t] != d.episode[s]: break
            seen['reward'] |= bool(d.rewards[t] != 0); seen['end'] |= bool(d.done[t])
            if d.done[t]: break
        assert seen == {k: bool(v[i]) for k, v in ahead.items()}
    assert d.done[starts + C - 1].any()
    cut = Tokens(d.codes, d.actions, d.rewards, torch.zeros_like(d.done), d.episode)                 # cut off instead of over: what follows is another game all the same
    assert not events_ahead(cut, C, reach)[1]['end'].any() and torch.equal(*(torch.as_tensor(e[1]['reward'])[np.isin(e[0], starts)] for e in (events_ahead(cut, C, reach), (starts, ahead))))


def test_meetings_and_what_dreams_say_of_them(monkeypatch):
    "A hit, a loss, an approach cut off by the end of its episode, one whose end is never seen; dreams that know, that know the opposite, that know nothing; the start lies `early` steps before."
    from atari_hrvq import dream
    x = [150, 165, 175, 185, 175, 160] + [150, 165, 175, 185, 195, 200] + [150, 170, 180] + [150, 170, 180] + [0] * 10 + [190, 200] + [0] * 3
    ram, episode = np.zeros((len(x), 128), np.uint8), np.repeat([0, 1, 2], [12, 3, 18])      # the last approach is first seen beyond the line
    ram[:, 54], ram[:, 49] = 100, x
    episodes = SimpleNamespace(game='pong', ram=ram, rewards=-np.isin(np.arange(len(x)), (11, 29)).astype(float), life_lost=episode > 5, episode=episode)
    at, missed = dream.meetings(episodes)
    assert at.tolist() == [2, 8] and missed.tolist() == [False, True] and dream.meetings(episodes, 10)[0].tolist() == [2]
    line = dream.MEETINGS['pong'][2]
    assert all(x[t] <= line < x[t + 1] for t in at)                  # hit or missed, the dream starts before the paddle could have touched the ball
    episodes.game = 'ms_pacman'
    with pytest.raises(BookError, match='no ball comes'): dream.meetings(episodes)
    class Forty(SimpleNamespace):
        def __len__(self): return 40
    tokens, seen = Forty(episode=torch.zeros(40, dtype=torch.long)), []
    for sign, expected in ((1, 1.), (-1, 0.), (0, .5)):
        def said(world, tokens, game, context, horizon, starts, seed=0, foresight=False):
            seen.append((starts.tolist(), horizon))
            return SimpleNamespace(reward=torch.tensor([[0., -.5 - sign * .2 * (s == 5)] for s in starts]), proceed=torch.ones(len(starts), 2))
        monkeypatch.setattr(dream, 'open_loop', said)
        told, lost = dream.losses_told(None, tokens, np.array([9, 11, 39]), np.array([False, True, True]), 0, context=4, early=3, draws=2)
        assert np.allclose(told, [.5, .5 + sign * .2]) and lost.tolist() == [False, True] and dream.told_apart(told, lost) == expected       # the last one has no steps behind it
        assert dream.told_of(told, lost) == pytest.approx((.5 + sign * .2, .5)) and dream.told_of(told[:1], lost[:1]) is None
        assert dream.told_apart(told[:1], lost[:1]) is None and len(dream.losses_told(None, tokens, np.array([39]), np.array([True]), 0)[1]) == 0
    assert set(map(str, seen)) == {'([3, 5], 15)'}
