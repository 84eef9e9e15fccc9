"""Environments: a replay is the same steps, and stops where the episode does."""

from potstill.rollouts.environments import Env, Turn


class Countdown(Env):
    """Over after `row["turns"]` actions; each is answered with how many are left."""

    def reset(self, row):
        self.left = row["turns"]
        return row["prompt"]

    def step(self, action):
        self.left -= 1
        return Turn(f"{action} {self.left}", done=self.left == 0, reward=float(self.left == 0))


def test_a_replay_is_its_steps():
    env, other = Countdown(), Countdown()
    for e in (env, other):
        assert e.reset({"prompt": "go", "turns": 4}) == "go"
    assert env.replay(["a", "b", "c"]) == [other.step("a"), other.step("b"), other.step("c")]
    assert env.step("d") == Turn("d 0", True, 1.0)


def test_a_replay_stops_when_done():
    env = Countdown()
    env.reset({"prompt": "go", "turns": 2})
    assert env.replay(["a", "b", "c", "d"]) == [Turn("a 1"), Turn("b 0", True, 1.0)]
    env.reset({"prompt": "go", "turns": 2})
    assert env.replay([]) == []


def test_an_environment_plays_again_after_a_reset():
    env = Countdown()
    for _ in range(2):
        env.reset({"prompt": "go", "turns": 1})
        assert env.step("x").done
