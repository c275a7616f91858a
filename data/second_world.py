"""A second world, for tuning: no topic, phrasing or sentence of the shipped one, another rubric and other habits.

Constants only, of the names of data/world.py, where they are explained; make_world.py makes a task of them.
Defaults that are chosen here owe nothing to the shipped task. What differs beside the words: 32 topics instead of
40, courtesies are worth less and steps more, so the best response is worth 5; rambling costs as much as an error;
more errors in the pairs, of another mix, and labels that are less sharp.
"""

# ruff: noqa: E501
TASKS = {
    "groom a horse": ("calm the horse", "brush the horse", "comb the tail of the horse", "feed the horse"),
    "clean a window": ("dust the window", "spray the window", "wipe the window", "polish the window"),
    "fix a chair": ("turn the chair over", "glue the chair leg", "clamp the chair", "sand the chair"),
    "start an account": ("pick a bank for the account", "show a card for the account", "agree to the account", "move money to the account"),
    "knit a scarf": ("wind yarn for the scarf", "cast on the scarf", "knit each row of the scarf", "bind off the scarf"),
    "mow the lawn": ("clear stones from the lawn", "start the lawn mower", "mow the lawn in rows", "rake the lawn"),
    "bathe a baby": ("warm a tub for the baby", "lower the baby slowly", "scrub the baby gently", "carry the baby to a towel"),
    "toss a salad": ("tear leaves for the salad", "slice carrots for the salad", "toss the salad", "dress the salad with oil"),
    "brew coffee": ("grind beans for coffee", "place a filter for the coffee", "drip steam through the coffee", "serve the coffee"),
    "fly a kite": ("attach string to the kite", "face the wind with the kite", "run with the kite", "make the kite climb"),
    "carve a pumpkin": ("cut a lid in the pumpkin", "scoop seeds from the pumpkin", "carve eyes in the pumpkin", "place a candle inside the pumpkin"),
    "train a puppy": ("call the puppy", "teach the puppy to sit", "praise the puppy", "walk the puppy daily"),
    "play chess": ("arrange the chess board", "move a pawn in chess", "guard the chess king", "trap the other chess king"),
    "ride a bus": ("reach the bus stop", "wave at the bus", "pay on the bus", "leave the bus carefully"),
    "throw a party": ("invite people to the party", "decorate for the party", "serve snacks at the party", "sweep after the party"),
    "sell a house": ("price the house", "list the house online", "show the house to buyers", "give up the house keys"),
    "join an election": ("register for the election", "study the election", "mark a ballot in the election", "drop the election ballot"),
    "climb a mountain": ("map the mountain", "rope up on the mountain", "climb the mountain slowly", "camp on the mountain"),
    "pickle cucumbers": ("slice the cucumbers", "pack the cucumbers", "pour vinegar over the cucumbers", "seal the cucumbers"),
    "unclog a drain": ("scoop hair from the drain", "plunge the drain", "run a hose down the drain", "flush the drain"),
    "back up a computer": ("plug a disk into the computer", "select data on the computer", "copy the computer data", "test the computer copy"),
    "sharpen a knife": ("soak a stone for the knife", "angle the knife", "stroke the knife along the stone", "try the knife on cloth"),
    "milk a goat": ("tether the goat", "brush the goat", "squeeze milk from the goat", "strain the goat milk"),
    "press flowers": ("gather the flowers", "arrange the flowers between sheets", "weigh down the flowers", "frame the flowers"),
}  # fmt: skip
EXPLANATIONS = {
    "the tide": ("the sea feels a pull at the tide", "waves swell into the tide", "the tide covers the beach", "the tide goes out"),
    "a glacier": ("snow piles up on the glacier", "weight packs the glacier", "the glacier slides along", "the glacier breaks up"),
    "a magnet": ("iron lines up in the magnet", "a field surrounds the magnet", "the magnet grabs steel", "the magnet turns north"),
    "digestion": ("teeth begin digestion", "juices continue digestion", "the gut absorbs in digestion", "waste remains from digestion"),
    "a telescope": ("the telescope gathers starlight", "a mirror in the telescope tilts it", "the telescope enlarges it", "eyes look in the telescope"),
    "inflation": ("banks lend more before inflation", "demand grows under inflation", "prices climb with inflation", "savings shrink from inflation"),
    "a beehive": ("a queen founds the beehive", "workers enlarge the beehive", "nectar reaches the beehive", "the beehive stores honey"),
    "a hurricane": ("warm seas feed the hurricane", "winds spin the hurricane", "the hurricane strikes the coast", "the hurricane fades"),
}  # fmt: skip
TOPICS = {**TASKS, **EXPLANATIONS}

TASK_PHRASINGS = (
    "How should we {}?",
    "Is it hard to {}?",
    "We must {} today.",
    "Which steps are needed to {}?",
    "Guide me as I {}.",
    "Could you describe how to {}?",
    "My job is to {}.",
    "Say how one can {}.",
    "It is time to {}.",
    "Give me a plan to {}.",
    "Where would one start to {}?",
    "My sister wishes to {}.",
)
EXPLANATION_PHRASINGS = (
    "Could you describe {}?",
    "Give me the facts on {}.",
    "How should we picture {}?",
    "My class is on {}.",
    "Which facts describe {}?",
    "Let us study {}.",
    "Give me a lesson on {}.",
    "What happens in {}?",
    "I have read of {}.",
    "Where would one meet {}?",
    "Say more on {}.",
    "My sister asks of {}.",
)
PHRASINGS = dict.fromkeys(TASKS, TASK_PHRASINGS) | dict.fromkeys(EXPLANATIONS, EXPLANATION_PHRASINGS)

FIRST, BETWEEN, LAST = "Initially", ("Afterwards", "Later"), "Lastly"
CONNECTIVES = (FIRST, *BETWEEN, LAST)

SENTENCES = {
    "opening": ("Sure, here it is!", "Glad that you came to me!", "Of course!", "Let us see!"),
    "closing": ("Good luck with it!", "Write again soon!", "Enjoy your evening!", "All the best to you!"),
    "rude": ("Are you serious?", "Nobody needs this.", "Figure it out yourself.", "How lazy of you."),
    "filler": (
        "The train was late on Monday.",
        "Blue suits my brother.",
        "They sell shoes near here.",
        "Winter seems far away.",
        "His neighbor plays golf.",
        "Pizza tastes great cold.",
    ),
    "vague": ("Opinions differ here.", "Nobody can say for sure."),
}

WEIGHTS = {
    "steps": 1.0,
    "opening": 0.5,
    "closing": 0.5,
    "rude": -1.5,
    "filler": -1.0,
    "vague": -1.0,
    "foreign": -1.0,
    "garbled": -1.5,
    "repeated": -0.5,
    "misplaced": -1.0,
    "disordered": -1.0,
}

# For each of the 288 train and 96 test prompts
DEMONSTRATIONS_PER_PROMPT = {"train": 8, "test": 2}
PAIRS_PER_PROMPT = {"train": 25, "test": 10}

HUMAN = {
    "opening": {"opening": 0.25, "rude": 0.10, None: 0.65},
    "closing": {"closing": 0.40, "rude": 0.12, None: 0.48},
    "steps": {4: 0.15, 3: 0.28, 2: 0.27, 1: 0.20, 0: 0.10},
    "fillers": {0: 0.45, 1: 0.33, 2: 0.22},
    "disorder": 0.08,
    "off_topic": 0.03,
}
BETTER = {
    "opening": {"opening": 0.55, "rude": 0.03, None: 0.42},
    "closing": {"closing": 0.65, "rude": 0.03, None: 0.32},
    "steps": {4: 0.50, 3: 0.28, 2: 0.14, 1: 0.06, 0: 0.02},
    "fillers": {0: 0.72, 1: 0.20, 2: 0.08},
    "disorder": 0.05,
}

ERROR = 0.12
ERRORS = {
    "splice": 0.24,
    "foreign_step": 0.20,
    "garble": 0.24,
    "cut_short": 0.12,
    "repeat": 0.10,
    "off_topic": 0.06,
    "stuff_courtesy": 0.04,
}
CLOSE_PAIRS = 0.4
CLOSE_PAIR_BY_ERROR = 0.2
SHARPNESS = 1.5
