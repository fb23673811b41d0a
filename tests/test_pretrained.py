"""pretrained: half precision, hashes, the stored dream, and folders that are not what they say."""
import base64
import io
import re
import shutil
from types import SimpleNamespace
import pytest
import torch
from atari_hrvq import pretrained
from atari_hrvq.agent import Agent
from atari_hrvq.core import BookError, Stage, load_tree, repo_path, save_tree
from atari_hrvq.hrvq import Tokenizer, TokenizerConfig
from atari_hrvq.frames import RandomPolicy, ReadingPolicy, collect, pack_replay, shipped_replay, store_episodes
from atari_hrvq.pretrained import compared, dream_of, fidelity_of_play, film, film_strip, memory_of, pack, score, verify
from atari_hrvq.world import WorldModel

SMALL = dict(dim=32, heads=2, experts=(1, 2), windows=(4, 8), hidden=32, shared_hidden=8, cell_hidden=16)
CONTEXTS = torch.randint(0, 256, (3, 4, 1, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long)


def make(seed=0):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TokenizerConfig(games=('pong',), grid=1)).eval()
    for q in tokenizer.quantizer.levels: q.codebook.normal_(); q.count.fill_(1e5); q.total.copy_(q.codebook * 1e5); q.started.fill_(True)       # counts do not fit into half precision
    return Agent.fresh(tokenizer, WorldModel.for_tokenizer(tokenizer, **SMALL), hidden=16, context=4)


@pytest.fixture
def folder(tmp_path):
    pack(make(), tmp_path / 'toy', CONTEXTS, {'pong': {'mean': -20., 'lo': -21., 'hi': -19., 'episodes': 30}}, {'profile': 'none'}, steps=5)
    return tmp_path / 'toy'


def test_a_folder_verifies_and_is_half_as_large(folder, tmp_path):
    assert all(r['ok'] for r in verify(folder)) and verify(folder)[-1]['result'].startswith('bit for bit')
    make().save_pretrained(tmp_path / 'whole')
    for part in ('tokenizer', 'world', 'policy'):
        half, whole = ((f / part / 'model.safetensors').stat().st_size for f in (folder, tmp_path / 'whole'))
        assert half < .56 * whole
    agent = Agent.from_pretrained(folder)
    assert all(torch.isfinite(v).all() for m in (agent.tokenizer, agent.world, agent.policy) for v in m.state_dict().values() if v.is_floating_point())
    assert next(agent.world.parameters()).dtype == torch.float32


def test_the_dream_follows_from_weights_and_seed(folder):
    agent = Agent.from_pretrained(folder)
    one, again, other = (dream_of(agent, *CONTEXTS, 5, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one) and not torch.equal(one['codes'], other['codes'])
    agent.world.heads.free[0][2].weight.data.normal_()
    assert not torch.equal(one['codes'], dream_of(agent, *CONTEXTS, 5, 0)['codes'])


def test_a_new_dream_that_differs_is_told(folder):
    "The manifest is right but the weights are not those that dreamt."
    from atari_hrvq.core import file_hash, read_json, write_json
    pack(make(3), folder.with_name('three'), CONTEXTS, {}, {}, steps=5)
    shutil.copy(folder / 'dream.safetensors', folder.with_name('three') / 'dream.safetensors')
    manifest = read_json(folder.with_name('three') / 'manifest.json')
    manifest['files']['dream.safetensors'] = file_hash(folder / 'dream.safetensors')
    write_json(folder.with_name('three') / 'manifest.json', manifest)
    rows = verify(folder.with_name('three'))
    assert [r['ok'] for r in rows][-1] is False and 'codes from step' in rows[-1]['result']


def test_what_differs_in_a_dream_is_named(folder):
    "Another ending head and another reward head are not 'the last bits'; the last bits are."
    stored = load_tree(folder / 'dream.safetensors')['dream']
    change = lambda k, by: compared({**stored, k: stored[k] ^ True if by is None else stored[k] + by}, stored)
    assert compared(dict(stored), stored) == {'result': 'bit for bit the stored one', 'ok': True}
    assert change('reward', 1e-6)['ok'] and 'last bits' in change('reward', 1e-6)['result']
    assert change('reward', .1) == {'result': 'another one: rewards from step 1 on', 'ok': False} and change('proceed', None) == {'result': 'another one: endings from step 1 on', 'ok': False}
    later = stored['codes'].clone(); later[:, 3:] += 1
    assert compared({**stored, 'codes': later}, stored)['result'] == 'another one: codes from step 4 on'


def test_a_manifest_without_files_is_one_sentence(folder):
    (folder / 'manifest.json').write_text('{}')
    with pytest.raises(BookError, match='lists no files'): verify(folder)


def test_files_cut_short_or_missing_are_named_and_nothing_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(Agent, 'from_pretrained', lambda *a: pytest.fail('loaded a folder that is not whole'))
    weights = folder / 'world' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    assert [r['check'] for r in verify(folder) if not r['ok']] == ['world/model.safetensors']
    weights.unlink()
    assert [r['result'] for r in verify(folder) if not r['ok']] == ['missing']


@pytest.mark.parametrize('part, sentence', [('tokenizer', 'tokens of tokenizer'), ('world/model.safetensors', 'damaged')])
def test_a_folder_put_together_wrongly_is_refused(folder, part, sentence):
    if part == 'tokenizer': make(5).tokenizer.save_pretrained(folder / part)
    else: (folder / part).write_bytes((folder / part).read_bytes()[:500])
    with pytest.raises(BookError, match=sentence): Agent.from_pretrained(folder)


def test_unknown_games_and_folders_are_one_sentence(folder, tmp_path):
    with pytest.raises(BookError, match="do not know 'breakout': expected one of pong"): score(folder, 'breakout', 1)
    with pytest.raises(BookError, match='no manifest.json'): verify(tmp_path)
    with pytest.raises(BookError, match="scores name 'breakout'"): pack(make(), tmp_path / 'x', CONTEXTS, {'breakout': {}}, {})
    assert not (tmp_path / 'x').exists()


def test_scores_stand_beside_random_play_and_what_was_shipped(folder):
    rows = score(folder, 'pong', 2, max_steps=30)
    assert [r['player'] for r in rows] == ['toy', 'random play', 'as shipped']
    assert all(r['cut short'] == 2 and r['agent steps'] == 60 and r['frames'] == 240 for r in rows[:2]) and rows[2]['mean'] == -20.


def test_all_that_is_shipped_stays_small():
    assert sum(f.stat().st_size for f in repo_path('pretrained').rglob('*.safetensors')) < 40e6


def test_packing_again_replaces_the_folder(folder):
    before = Agent.from_pretrained(folder).tokenizer.hash()
    (folder / 'stray').write_text('old')
    pack(make(7), folder, CONTEXTS, {}, {}, steps=5)
    assert not (folder / 'stray').exists() and Agent.from_pretrained(folder).tokenizer.hash() != before and all(r['ok'] for r in verify(folder))


def test_shipping_keeps_the_record_of_the_agent_it_went_on_from_and_is_done_once(tmp_path, monkeypatch):
    "Under another label the record is still that of the agent it went on from; in its place, a second time is refused before anything is written."
    import json
    from atari_hrvq.core import file_hash, read_json, write_json
    from atari_hrvq.pretrained import ship_agent
    parts = [collect('pong', RandomPolicy('pong'), 120, s) for s in (0, 1)]
    origin, rows = tmp_path / 'three-games', [{'chapter': '10_agent', 'curve': 'rounds', 'round': 0, 'real_steps': 120}, {'chapter': '10_agent', 'curve': 'dream', 'round': 0, 'step': 0, 'dream_reward': .1}]
    agent = make(); agent.real_steps = 120; agent.tokenizer.background.measure({'pong': parts[0]})
    pack(agent, origin, CONTEXTS, {}, {'profile': 'smoke', 'seconds of the loop': 7.}, steps=5, replay=pack_replay({'pong': parts[:1]}))
    (origin / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows)); (origin / 'README.md').write_text('')
    monkeypatch.setattr(pretrained, 'repo_path', lambda p: tmp_path)
    monkeypatch.setattr(pretrained, 'score', lambda *a, **k: [{'mean': -20., 'lo': -21., 'hi': -19., 'episodes': 1, 'cut short': 0, 'agent steps': 9}] * 2)
    def cool(agent, games, temperatures, episodes, seed): agent.temperature = {'pong': min(temperatures)}; return [{'game': 'pong', 'temperature': t, 'score': 1., 'lo': 0., 'hi': 2., 'steps': 50, 'episodes': episodes, 'kept': t == min(temperatures)} for t in temperatures]
    monkeypatch.setattr(pretrained, 'cool', cool)
    monkeypatch.setattr(pretrained, 'film', lambda agent, episodes, path: path.write_bytes(b'GIF89a'))
    run = tmp_path / 'run'; stage = Stage('10_agent', run, 'smoke', ('pong',), 0, 'pretrained'); agent.real_steps = 240
    stage.save('agent', agent); store_episodes(stage, 'agent-first-pong', parts[1])
    stage.curve('rounds', [{'round': 0, 'real_steps': 240}]); stage.curve('dream', [{'round': 0, 'step': 0, 'dream_reward': .2}]); stage.curve('recipe', [{'last': 4, 'went on from': file_hash(origin / 'manifest.json')}])
    stage.metric('real_steps', 240, cell='x'); stage.done(); write_json(run / 'run.json', {'profile': 'smoke', 'games': ['pong'], 'seed': 0, 'start': 'pretrained'})
    for folder in (tmp_path / 'mine', origin):
        ship_agent(run, folder, {}, **({'temperatures': (1., .5)} if folder == origin else {}))
        assert read_json(folder / 'config.json').get('temperature') == ({'pong': .5} if folder == origin else None) and ('at the temperature 0.5 (pong)' in (folder / 'README.md').read_text()) == (folder == origin)
        made = read_json(folder / 'manifest.json')['made']
        assert made['went on from']['seconds of the loop'] == 7. and made['recipe'] == {'last': 4} and 'recipe: last' in (folder / 'README.md').read_text()
        told = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        assert [r['real_steps'] for r in told if r.get('curve') == 'rounds'] == [120, 240] and [len(p['actions']) for p in load_tree(folder / 'replay.safetensors')['pong']] == [120, 120]
    before = {f: f.read_bytes() for f in origin.rglob('*') if f.is_file()}
    with pytest.raises(BookError, match='is not the agent that .* went on from'): ship_agent(run, origin, {})
    assert before == {f: f.read_bytes() for f in origin.rglob('*') if f.is_file()}


def test_every_shipped_agent_is_whole_and_named_on_the_page():
    import json
    shipped = sorted(p.parent for p in repo_path('pretrained').glob('*/manifest.json'))
    for f in shipped: assert [r for r in verify(f)[:-1] if not r['ok']] == []                           # the dream may differ on another processor
    page = next(c for c in json.loads(repo_path('nbs/14_pretrained.ipynb').read_text())['cells'] if c['id'] == 'shipped')
    said = json.dumps(page['outputs'])
    assert [f.name for f in shipped] == ['three-games'] and all(f.name in said for f in shipped)


def test_a_film_shows_the_real_frames_beside_the_dream(tmp_path):
    import numpy as np
    from PIL import Image, ImageSequence
    agent, played = make(), collect('pong', RandomPolicy('pong'), 60, 0)
    agent.tokenizer.background.measure({'pong': played})
    starts = film(agent, played, tmp_path / 'film.gif', steps=6, stretches=2)
    frames = [np.asarray(f.convert('L')) for f in ImageSequence.Iterator(Image.open(tmp_path / 'film.gif'))]
    assert len(frames) <= 12 and frames[0].shape == (168, 340)                                       # equal pictures are one
    assert (frames[0][::2, :168:2] == played.frames[starts[0] + agent.context] // 8 * 8).mean() > .99
    film(agent, played, tmp_path / 'dream-pong.gif', steps=6, stretches=2); film(agent, played, tmp_path / 'dream-other.gif', steps=6, stretches=2)
    html = film_strip(tmp_path, frames=5).data
    small = [Image.open(io.BytesIO(base64.b64decode(part.split('"')[0]))) for part in html.split('base64,')[1:]]
    assert re.findall(r'alt="(\w+): left', html) == ['other', 'pong'] and [(i.n_frames, i.size) for i in small] == [(5, (170, 84))] * 2
    with pytest.raises(BookError, match='holds no film'): film_strip(tmp_path / 'nowhere')
    with pytest.raises(BookError, match='film fewer steps'): film(agent, played, tmp_path / 'film.gif', steps=80)


def test_the_benchmark_plays_what_is_there(folder, tmp_path, monkeypatch):
    "In bf16 too where the CPU has instructions for it."
    import atari_hrvq.bench as bench
    for slow in (True, False):
        monkeypatch.setattr(bench, 'lacks_bf16', lambda: slow)
        rows = bench.bench_agent(2, 1, 1, root=tmp_path)
        assert [r['unit'] for r in rows] == ['s', 'agent steps/s', 'dream steps/s', 'dream steps/s'][:4 - slow]
    assert 0 < rows[0]['value'] < 60 and all(r['value'] > 0 for r in rows) and all(r['peer_ratio'] > 0 for r in rows[2:]) and rows[3]['name'] == rows[2]['name'] + ', in bf16'
    with pytest.raises(BookError, match='holds no agent'): bench.bench_agent(root=tmp_path / 'toy')


def test_what_the_codes_know_of_the_last_part_stands_beside_untrained_codes():
    parts = [collect('pong', ReadingPolicy('pong'), 300, s) for s in (0, 1)]
    tokenizer = make().tokenizer
    found = fidelity_of_play(tokenizer, parts, 'ridge')
    assert {k.split('_')[0] for k in found} == {'ball', 'player'} and all(a <= 1 and b <= 1 for a, b in found.values())
    assert found == fidelity_of_play(tokenizer, parts, 'ridge') and any(a != b for a, b in found.values())
    with pytest.raises(BookError, match='another round'): fidelity_of_play(tokenizer, parts[:1])


def test_all_that_it_learned_from_is_shipped_once(tmp_path, monkeypatch):
    "From scratch: the beginning of random play, then its rounds. Gone on: the parts shipped before as they were, also those that the run did not look at, then what it played."
    random, a, b = (collect('breakout', RandomPolicy('breakout'), n, s) for n, s in ((90, 0), (40, 1), (30, 2)))
    stage, agent = Stage('11_evaluate', tmp_path / 'run', 'smoke', ('breakout',), 0), SimpleNamespace(real_steps=130)
    for name, e in (('frames-breakout-train', random), ('agent-replay-breakout-0', a), ('agent-replay-breakout-1', b)): store_episodes(stage, name, e)
    files, episodes, replay = memory_of(stage, agent, False)
    assert [len(e) for e in episodes['breakout']] == [60, 40, 30] and list(files['breakout']) == ['frames-breakout-train.safetensors', 'agent-replay-breakout-0.safetensors', 'agent-replay-breakout-1.safetensors']
    for i, e in enumerate((b, a)): store_episodes(stage, f'agent-given-breakout-{i}', e)                    # play that it was given is in the place of random play, all of it
    assert [len(e) for e in memory_of(stage, agent, False)[1]['breakout']] == [30, 40, 40, 30]
    save_tree(tmp_path / 'shipped' / 'replay.safetensors', replay)
    monkeypatch.setattr(pretrained, 'repo_path', lambda p: tmp_path); monkeypatch.setitem(pretrained.SHIPPED, 'agent', 'shipped')
    again = shipped_replay(tmp_path / 'shipped', 'breakout')
    assert [e.hash() for e in again] == [e.hash() for e in episodes['breakout']]
    stage = Stage('11_evaluate', tmp_path / 'on', 'smoke', ('breakout',), 0, 'pretrained')
    for name, e in (('agent-old-breakout-2', b), ('agent-first-breakout', a), ('agent-replay-breakout-0', random)): store_episodes(stage, name, e)
    files, episodes, replay = memory_of(stage, agent, True)
    assert [len(e) for e in episodes['breakout']] == [30, 40, 90] and [len(p['actions']) for p in replay['breakout']] == [60, 40, 30, 40, 90]
    assert list(files['breakout']) == ['agent-old-breakout-2.safetensors', 'agent-first-breakout.safetensors', 'agent-replay-breakout-0.safetensors']


def test_the_replay_travels_as_seeds_and_actions(tmp_path):
    "Several episodes, one of them short; what comes out is what was played, and an altered action, an unknown game or no replay is one sentence."
    parts = [collect('breakout', RandomPolicy('breakout'), n, s) for n, s in ((400, 0), (60, 1))]
    pack(make(), tmp_path / 'toy', CONTEXTS, {}, {}, steps=5, replay=pack_replay({'breakout': parts}))
    again = shipped_replay(tmp_path / 'toy', 'breakout')
    assert [e.hash() for e in again] == [e.hash() for e in parts] and (again[0].frames == parts[0].frames).all() and len(parts[0].seeds) > 1
    assert all(r['ok'] for r in verify(tmp_path / 'toy'))
    with pytest.raises(BookError, match="does not know 'pong'.*expected one of breakout"): shipped_replay(tmp_path / 'toy', 'pong')
    path = tmp_path / 'toy' / 'replay.safetensors'
    tree = load_tree(path); tree['breakout'][1]['actions'][30:] = 3; save_tree(path, tree)
    with pytest.raises(BookError, match='part 1 of breakout.*another hash'): shipped_replay(tmp_path / 'toy', 'breakout')
    path.unlink()
    with pytest.raises(BookError, match='without what it learned from'): shipped_replay(tmp_path / 'toy', 'breakout')
