"""explore: what the widgets are told, on small made-up models and real frames; the browser itself is tested in browser/."""
import base64
import gzip
import io
import json
import re
import struct
import threading
import urllib.error
import urllib.request
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from atari_hrvq import explore as X
from atari_hrvq.core import BookError, Stage
from atari_hrvq.frames import RandomPolicy, collect, legal_actions, screen_positions, state_labels
from atari_hrvq.hrvq import Tokenizer, TokenizerConfig
from atari_hrvq.world import WorldModel

GAMES = ('pong', 'breakout')


@pytest.fixture(scope='module')
def episodes(): return {g: collect(g, RandomPolicy(g), 90, 0) for g in GAMES}


@pytest.fixture(scope='module')
def tokenizer(episodes):
    return started(episodes, TokenizerConfig(games=GAMES, codes=16))


def started(episodes, config):
    torch.manual_seed(0)
    t = Tokenizer(config)
    t.background.measure(episodes)
    frames = np.concatenate([e.frames for e in episodes.values()])[:, None]
    t.start(torch.from_numpy(frames), torch.arange(2).repeat_interleave(90))
    return t.eval()


@pytest.fixture(scope='module')
def world(tokenizer):
    torch.manual_seed(0)
    return WorldModel.for_tokenizer(tokenizer, dim=32, heads=2, experts=(1, 3), windows=(4, 8), hidden=16, shared_hidden=8, cell_hidden=16).eval()


@pytest.fixture(scope='module')
def player(tokenizer, world, episodes): return X.Player((tokenizer, world, None), episodes)


def unpacked(data): return np.asarray(Image.open(io.BytesIO(base64.b64decode(data['src'].split(',')[1]))))


def test_a_sheet_gives_its_pictures_back():
    pictures, sheet = np.random.default_rng(0).integers(0, 256, (7, 84, 84)), X.Sheet()
    at = [sheet.add(p) for p in (*pictures, pictures[2])]
    data = sheet.data(); whole, n = unpacked(data), data['columns']
    assert at == [0, 1, 2, 3, 4, 5, 6, 2] and all((whole[84 * (i // n):84 * (i // n + 1), 84 * (i % n):84 * (i % n + 1)] == p).all() for i, p in enumerate(pictures))
    assert unpacked(X.Sheet().data()).shape == (84, 84)


def test_a_sheet_with_few_grays_is_near():
    x = np.arange(256).repeat(28)[:84 * 84].reshape(84, 84); s = X.Sheet(16); s.add(x)
    assert np.abs(s.pictures[0].astype(int) - x).max() <= 9 and len(np.unique(s.pictures[0])) == 16


def test_the_band_holds_counts_without_meaning():
    rng = np.random.default_rng(1); game = np.repeat([0, 1, 2], 200); count = rng.poisson(.3, (600, 40))
    low, high = X.null_band(count, game)
    of = count[game == 0].sum(0)
    assert ((of >= low) & (of <= high)).mean() > .8
    count[:, 0] = game == 0                                                    # a code of one game alone
    assert count[game == 0, 0].sum() > X.null_band(count, game)[1][0]


def test_tells_finds_the_variable():
    rng = np.random.default_rng(2); y = rng.normal(size=500); seen = np.stack([y > 1, rng.random(500) < .3], 1).astype(float)
    d, n = X.tells(seen, y)
    assert d[0] > 1 and abs(d[1]) < .3 and n[0] == (y > 1).sum()


def test_map_and_cover():
    book = np.random.default_rng(3).normal(size=(20, 8)) * np.array([9, 5, *[.1] * 6])
    xy, share = X.code_map(book)
    assert xy.min() == 0 and xy.max() == 1 and share > .99 and X.code_map(book[:1])[0].shape == (1, 2)
    codes = np.random.default_rng(4).integers(0, 256, (100, 9, 3)).astype(np.uint8); codes[7, 0, 0] = 1
    pick = X.covering(codes, 10)
    assert len(pick) == 10 and len(set(pick)) == 10 and (np.diff(pick) > 0).all() and len(X.covering(codes[:3], 10)) == 3


def test_code_examples_agree_with_the_codes(tokenizer, episodes):
    d = X.code_examples(tokenizer, episodes, frames=60, shown=5)
    json.dumps(d)
    for l, level in enumerate(d['levels']):
        assert sum(map(sum, level['count'])) == 2 * 60 * 9 == sum(map(sum, level['where']))
        k = len(level['codes']); assert all(len(level[x]) == k for x in ('count', 'band', 'balance', 'information', 'where', 'xy', 'near', 'tells'))
        for s in d['sheets']: assert {c[l] for f in s['codes'] for c in f} <= set(level['codes'])
    s = d['sheets'][1]; picture = unpacked(s)[:84, :84]
    assert (picture == episodes['breakout'].frames[s['steps'][0]]).all()
    assert tokenizer.encode(torch.from_numpy(picture[None, None].copy()))[0].tolist() == s['codes'][0]


def test_levels_measure_the_error(tokenizer, episodes):
    coarse = started(episodes, replace(tokenizer.config, grid=1))
    d, seen = X.level_pictures(tokenizer, episodes, 2, others={'one cell': coarse}), []
    assert d['tokenizers'] == [f'{tokenizer.config.grid} x {tokenizer.config.grid} cells', 'one cell'] and d['bits'] == [4 * tokenizer.config.grid ** 2, 4]      # of 16 codes
    for r in d['rows']:
        e, i = episodes[r['game']], r['step']
        for by, t in zip(r['by'], (tokenizer, coarse), strict=True):
            game = t.game_index(r['game'])
            three = t.decode(t.encode(torch.from_numpy(e.frames[[i]][:, None])), game)[0].numpy()
            assert abs(np.square(t.background.median[game].numpy() - e.frames[i]).mean() ** .5 - by['error'][0]) < .02 and len(by['decoded']) == 4
            assert abs(np.square(three - e.frames[i]).mean() ** .5 - by['error'][3]) < .02
            places = {name: xy[0] for name, xy in screen_positions(r['game'], state_labels(r['game'], e.ram[[i]])[0]).items()}
            median = t.background.median[game].numpy()
            for name, shares in by['objects'].items():
                column, row = (min(80, max(3, round(float(v)))) for v in places[name])
                left = [np.mean([(picture[y, x] - float(e.frames[i, y, x])) ** 2 for y in range(row - 3, row + 4) for x in range(column - 3, column + 4)]) ** .5 for picture in (median, three)]
                assert shares[0] == 1 and abs(shares[3] - left[1] / left[0]) < 1e-3 and left[0] > 1
                seen.append((column, row))
    assert len(seen) > 4 and any(abs(c - r) > 7 for c, r in seen)
    assert X.level_pictures(tokenizer, episodes, 1, others={'5 codes': started(episodes, replace(tokenizer.config, codes=5))})['bits'][1] == 21       # 9 cells of log2(5) bits


def test_experts_are_those_of_the_steps(tokenizer, world, episodes):
    d = X.expert_map(world, tokenizer, episodes, 20)
    assert d['experts'] == [1, 3] and all(sum(map(sum, g)) == 90 for layer in d['load'] for g in layer) and d['information'][0] == 0
    tokens = X.tokenise(tokenizer, episodes['pong'])
    assert (X.expert_choices(world, tokens, 0)[:, 0] == 0).all() and X.expert_choices(world, tokens, 0)[:20].T.tolist() == d['strips'][0]['choice']


def test_a_dream_is_repeated_and_begins_where_the_game_is(player, episodes):
    runs = []
    for _ in range(2):
        d = X.Dreamer(player.models, episodes['pong']); rows = [d.start(3)]
        while len(rows) < 6 and not d.over: rows.append(d.step(3))
        runs.append(rows)
    assert (runs[0][0]['real'] == episodes['pong'].frames[runs[0][0]['origin']]).all() and len(runs[0]) == len(runs[1])
    for a, b in zip(*runs, strict=True): assert (a['dream'] == b['dream']).all() and (a['real'] == b['real']).all() and a.get('error') == b.get('error')


def test_the_real_game_gets_the_same_actions(player, episodes):
    "Fed with the actions of the recorded episode, the real game shows the recorded frames."
    e, d = episodes['breakout'], X.Dreamer(player.models, episodes['breakout'])
    i = d.start(1)['origin']
    for t in range(i, min(i + 5, len(e) - 1)):
        d.over = False
        assert (d.step(int(e.actions[t]))['real'] == e.frames[t + 1]).all()


def test_parting_is_against_a_still_picture():
    assert X.parting([2, 3, 4], [9, 9, 9], 2) is None and X.parting([2, 3, 4], [1, 1, 1], 2) == 0 and X.parting([.1, .2], [0, 0], 1) is None


@pytest.mark.parametrize('game', ['pong', 'breakout', 'ms_pacman', 'freeway'])
def test_every_legal_action_has_its_keys(game):
    keys = X.controls(game)
    assert sorted(keys.values()) == sorted(legal_actions(game)) and keys[''] == 0


def test_the_player_answers_and_says_what_is_wrong(player):
    assert 'expected one of' in player.handle({'do': 'dance'})[0]['sentence'] and 'expected one of' in player.handle({})[0]['sentence']
    fresh = X.Player(player.models, player.episodes)
    assert 'not begun' in fresh.handle({'do': 'step', 'action': 0})[0]['sentence']
    assert "unknown game 'chess'" in fresh.handle({'do': 'start', 'game': 'chess'})[0]['sentence']
    now, pictures = fresh.handle({'do': 'start', 'game': 'pong', 'seed': 1}); json.dumps(now)
    assert now['step'] == 0 and [len(p) for p in pictures] == [7056, 7056]
    assert 'illegal' in fresh.handle({'do': 'step', 'action': 17})[0]['sentence'] and '10_agent' in fresh.handle({'do': 'step', 'action': None})[0]['sentence']
    now, pictures = fresh.handle({'do': 'step', 'action': 3})
    assert now['step'] == 1 and now['by'] == 'you' and len(pictures) == 2


@pytest.mark.parametrize('message, expected', [({'do': 'start', 'game': 'pong', 'seed': 'x'}, "seed 'x' is not a whole number from 0 on"), ({'do': 'start', 'seed': -1}, 'seed -1 is not'), ({'do': 'start', 'seed': True}, 'seed True is not'),
    ({'do': 'step', 'action': 'up'}, "action 'up' is no number of an action: expected one of (0, 1, 3, 4, 11, 12)"), ({'do': 'step', 'action': 1.5}, 'action 1.5 is no number')])
def test_words_that_are_no_numbers(player, message, expected):
    fresh = X.Player(player.models, player.episodes)
    now, _ = fresh.handle({'do': 'start', 'game': 'pong', 'seed': 1})
    said, pictures = fresh.handle(message)
    assert expected in said['sentence'] and pictures == []
    assert fresh.handle({'do': 'step', 'action': 3})[0]['step'] == 1                       # and the dream goes on


def test_the_player_dreams_on_one_thread_and_gives_the_others_back(player, monkeypatch):
    before, inside = torch.get_num_threads(), []
    monkeypatch.setattr(X.Player, '_handle', lambda self, m: inside.append(torch.get_num_threads()) or ({}, []))
    try:
        torch.set_num_threads(2)
        player.handle({})
        assert inside == [1] and torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


class Endless(X.Dreamer):
    "A dream that its untrained world may not end."
    def step(self, action=None):
        now = super().step(action); self.over = now['over'] = False
        return now


def test_recordings_branch_from_the_trunk(player):
    dreamer, keys = Endless(player.models, player.episodes['pong']), ('dream', 'real', 'reward', 'proceed', 'error', 'still', 'action')
    tape = X.recording(dreamer, 0, 6, 2, 3)
    trunk, *branches = tape['tracks']
    assert trunk['fork'] is None and len(trunk['dream']) == 7 and set(trunk['action']) == {0}
    assert [(b['fork'], b['keys']) for b in branches] == [(f, k) for f in (2, 4) for k in ('up', 'down')]
    for track in tape['tracks']: assert len({len(track[k]) for k in keys}) == 1
    whole = X.record(dreamer, 0, 6)
    for b in branches:
        held = X.controls('pong')[b['keys']]
        assert b['action'] == [held] * 3 and not b['over']
        rows = X.record(dreamer, 0, b['fork'] + 3, b['fork'], held)
        for one, other in zip(rows[:b['fork'] + 1], whole, strict=False): assert (one['dream'] == other['dream']).all() and (one['real'] == other['real']).all()
        assert b['error'] == [round(r['error'], 3) for r in rows[b['fork'] + 1:]] and [r['step'] for r in rows[b['fork'] + 1:]] == list(range(b['fork'] + 1, b['fork'] + 4))


def test_the_server_keeps_to_its_key(player):
    server, address = X.player_server(player)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = urllib.request.urlopen(address).read().decode()
        assert 'https:' not in page.replace('http://www.w3.org/2000/svg', '') and '127.0.0.1' in address
        ask = lambda to, m: urllib.request.urlopen(urllib.request.Request(to, json.dumps(m).encode(), method='POST')).read()
        body = ask(address + 'message', {'do': 'start', 'game': 'breakout'}); n = struct.unpack('>I', body[:4])[0]
        assert json.loads(body[4:4 + n])['step'] == 0 and len(body) == 4 + n + 2 * 7056
        assert b'sentence' in ask(address + 'message', [1])
        for wrong in (address[:-2] + '/', address.rsplit('/', 2)[0] + '/', address + 'x'):
            with pytest.raises(urllib.error.HTTPError): urllib.request.urlopen(wrong)
        with pytest.raises(urllib.error.HTTPError): ask(address.rsplit('/', 2)[0] + '/message', {'do': 'start'})
        with pytest.raises(BookError, match='another one with --port'): X.player_server(player, server.server_address[1])
    finally: server.shutdown(); server.server_close()


def test_a_twin_holds_its_data_and_no_address():
    data = {'kind': 'sentence', 'text': '</script><script>alert("x")</script> & \u2028'}
    one, two = X.page_twin(data), X.page_twin(data)
    ids = [re.search('id="([^"]+)"', t)[1] for t in (one, two)]
    assert ids[0] != ids[1] and one.count('<script') == one.count('</script>') == 1 and 'alert' not in one and not re.search('https?:', one)
    packed = re.search(r'data: await text\("([^"]+)"', one)[1]
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == data


def test_module_asks_no_network():
    code = X.ESM.replace('http://www.w3.org/2000/svg', '')
    assert not re.search(r'https?:|fetch\(|XMLHttpRequest|WebSocket|importScripts|innerHTML', code)


@pytest.mark.parametrize('kind', X.WIDGETS)
def test_a_run_without_the_stage_says_which_chapter(tmp_path, kind):
    shown = X.explorer(Stage('90_explore', tmp_path / 'run', 'smoke', ['pong'], 0), kind)
    assert shown.data['kind'] == 'sentence' and 'run chapter 04_hrvq first' in shown.data['text'] and 'Traceback' not in shown.data['text']


def test_frames_that_are_missing_and_games_that_differ(tmp_path, tokenizer, world, episodes):
    stage = Stage('90_explore', tmp_path / 'run', 'smoke', ['pong', 'ms_pacman'], 0)
    stage.save('tokenizer', tokenizer); stage.save('world', world)
    assert 'run chapter 01_frames first' in X.explorer(stage, 'tokens').data['text']
    assert 'but the run also holds ms_pacman' in X.explorer(stage, 'dream').data['text']
    other = {'ms_pacman': collect('ms_pacman', RandomPolicy('ms_pacman'), 30, 0)}
    for make in (lambda: X.code_examples(tokenizer, other), lambda: X.level_pictures(tokenizer, other), lambda: X.expert_map(world, tokenizer, other), lambda: X.Dreamer((tokenizer, world, None), other['ms_pacman'])):
        with pytest.raises(BookError, match='does not know'): make()
    with pytest.raises(BookError, match='01_frames'): X.code_examples(tokenizer, {})
    with pytest.raises(BookError, match='is not a run folder'): X.open_run(tmp_path / 'nowhere')


def test_the_shipped_agent_needs_no_run(monkeypatch):
    "Its real beginnings are played when a game is asked for, once, and the dream begins on one of their frames."
    asked, real = [], X.play_games
    monkeypatch.setattr(X, 'play_games', lambda agent, games, *a, **k: asked.append(games) or real(agent, games, *a, **k))
    player = X.Player.shipped(games=['breakout', 'ms_pacman'], each=1, steps=30)
    assert list(player.episodes) == ['breakout', 'ms_pacman'] and player.game == 'breakout' and asked == []
    first, (dream, frame) = player.handle({'do': 'start', 'game': 'ms_pacman'})
    assert asked == [['ms_pacman']] and frame == player.episodes['ms_pacman'].frames[first['origin']].tobytes() != dream
    assert player.handle({'do': 'step', 'action': None})[0]['by'] == 'agent' and player.handle({'do': 'start', 'seed': 1})[0]['step'] == 0 and asked == [['ms_pacman']]
    assert player.dreamer('ms_pacman').heat == player.heat['ms_pacman'] < 1
    with pytest.raises(KeyError): player.episodes['pong']
    with pytest.raises(BookError, match="game 'tennis'"): X.Player.shipped('tennis')
