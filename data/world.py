"""The world of the shipped task: what can be asked, every sentence that an answer can hold, what each
is worth, and how people answer.

Constants only. `make_data.py` composes demonstrations and preference pairs from them, `judge.py`
recognises them again. The words are few and plain, so that a tokenizer of 1,024 entries spells
most of them in one token and a model of less than a million parameters learns the language in minutes.
Another world is another file of these names: `data/second_world.py`.
"""

# ruff: noqa: E501
# Each topic is answered in four steps, in this order. No step serves two topics, and every step names what its
# topic is about, as answers do: that an answer fits its prompt is then written in the two texts, where a reward
# model of this size can learn to see it, and need not be known by heart, which no few thousand pairs could teach.
TASKS = {  # "How do I ...?"
    "bake a cake": ("mix eggs for the cake", "pour the cake in a tin", "bake the cake for an hour", "let the cake cool"),
    "change a tire": ("loosen the nuts on the tire", "pull the old tire off", "push the new tire on", "tighten the tire nuts"),
    "make tea": ("boil water for tea", "put the tea in a pot", "pour water on the tea", "let the tea stand"),
    "cook rice": ("rinse the rice", "put the rice in a pan", "boil the rice", "let the rice rest"),
    "plant a tree": ("dig a hole for the tree", "set the tree in the hole", "cover the tree roots", "water the young tree"),
    "wash a car": ("rinse the car", "rub soap on the car", "wash the soap off the car", "dry the car"),
    "paint a wall": ("clean the wall", "tape the edge of the wall", "roll paint on the wall", "let the wall dry"),
    "write a letter": ("choose paper for the letter", "greet a friend in the letter", "tell your news in the letter", "sign the letter"),
    "send a package": ("fill the package", "close the package with tape", "write the address on the package", "take the package to the post"),
    "build a fire": ("find dry wood for the fire", "stack the fire wood", "light the fire", "add big logs to the fire"),
    "set up a tent": ("find flat ground for the tent", "lay the tent out", "push poles in the tent", "tie the tent down"),
    "wash a dog": ("wet the dog", "rub soap on the dog", "rinse the dog", "dry the dog"),
    "plan a trip": ("choose a place for the trip", "buy tickets for the trip", "book a room for the trip", "pack a bag for the trip"),
    "learn a song": ("listen to the song", "read the words of the song", "sing one line of the song", "sing the whole song"),
    "fry an egg": ("melt butter for the egg", "break the egg in a pan", "wait for the egg to set", "put salt on the egg"),
    "bake bread": ("mix flour for the bread", "knead the bread dough", "let the bread rise", "bake the bread"),
    "make soup": ("cut onions for the soup", "boil the soup", "stir the soup", "add salt to the soup"),
    "sew a button on": ("choose a thread for the button", "hold the button in place", "push the needle through the button", "tie a knot behind the button"),
    "iron a shirt": ("wet the shirt", "lay the shirt flat", "press the shirt", "hang the shirt up"),
    "hang a picture": ("mark a spot for the picture", "hammer a nail for the picture", "put the picture on the nail", "check that the picture is straight"),
    "grow tomatoes": ("plant the tomatoes in a pot", "keep the tomatoes in the sun", "water the tomatoes", "pick the red tomatoes"),
    "catch a fish": ("find a worm for the fish", "throw the line to the fish", "wait for the fish to bite", "pull the fish in"),
    "take a photo": ("clean the lens for the photo", "point the camera for the photo", "hold still for the photo", "press the photo button"),
    "treat a cut": ("wash the cut", "press on the cut", "dry the cut", "cover the cut with tape"),
    "find a job": ("read ads for a job", "ask about the job", "send a letter for the job", "talk with the boss about the job"),
    "save a file": ("open the file menu", "choose a folder for the file", "name the file", "click to keep the file"),
    "wrap a gift": ("lay the gift on paper", "fold paper over the gift", "tape the gift paper", "tie a ribbon on the gift"),
    "borrow a book": ("look for the book", "take the book to the desk", "read the book at home", "bring the book back"),
}  # fmt: skip
EXPLANATIONS = {  # "Can you explain ...?"
    "photosynthesis": ("roots bring water for photosynthesis", "leaves catch light for photosynthesis", "light drives photosynthesis", "photosynthesis makes sugar"),
    "the water cycle": ("the sun starts the cycle", "the cycle lifts water up", "the cycle forms clouds", "rain ends the cycle"),
    "the heart": ("blood enters the heart", "the heart fills", "the heart pumps blood out", "the heart rests"),
    "a volcano": ("rock melts under the volcano", "hot rock fills the volcano", "gas pushes in the volcano", "lava leaves the volcano"),
    "an earthquake": ("plates push before the earthquake", "a plate slips in the earthquake", "the earthquake shakes the ground", "the earthquake dies down"),
    "lightning": ("ice rubs before lightning", "charge builds for lightning", "lightning jumps down", "lightning makes thunder"),
    "a rainbow": ("light meets rain for the rainbow", "drops bend light for the rainbow", "colors split in the rainbow", "you see the rainbow"),
    "an eclipse": ("the moon moves for the eclipse", "a shadow starts the eclipse", "the eclipse turns the day dark", "light ends the eclipse"),
    "a steam engine": ("coal heats the engine", "steam fills the engine", "a piston moves in the engine", "the engine turns the wheel"),
    "a battery": ("acid eats metal in the battery", "charge builds in the battery", "a wire leaves the battery", "the battery lights a bulb"),
    "a vaccine": ("the vaccine holds a weak germ", "the body meets the vaccine", "the body learns from the vaccine", "the vaccine stops the germ"),
    "a fridge": ("a pump starts the fridge", "gas cools in the fridge", "cold air fills the fridge", "the fridge keeps food cold"),
}  # fmt: skip
TOPICS = {**TASKS, **EXPLANATIONS}

TASK_PHRASINGS = (
    "How do I {}?",
    "How can I {}?",
    "How do you {}?",
    "Please tell me how to {}.",
    "What is the way to {}?",
    "Can you show me how to {}?",
    "I want to {}.",
    "Help me to {}.",
    "What do I do to {}?",
    "Teach me how to {}.",
    "What is a good way to {}?",
    "I need to know how to {}.",
)
EXPLANATION_PHRASINGS = (
    "Can you explain {}?",
    "How does {} work?",
    "Please explain {}.",
    "Tell me about {}.",
    "What do you know about {}?",
    "Help me to understand {}.",
    "I want to know about {}.",
    "Please tell me how {} works.",
    "Teach me about {}.",
    "What can you tell me about {}?",
    "What is {}?",
    "I need to understand {}.",
)

PHRASINGS = dict.fromkeys(TASKS, TASK_PHRASINGS) | dict.fromkeys(EXPLANATIONS, EXPLANATION_PHRASINGS)

# A step becomes a sentence by the word before it: "First heat the oven. Finally bake it for an hour."
FIRST, BETWEEN, LAST = "First", ("Then", "Next"), "Finally"
CONNECTIVES = (FIRST, *BETWEEN, LAST)

# The other sentences of the language, by what the judge calls them.
SENTENCES = {
    "opening": ("Happy to help!", "What a good question!", "Thank you for asking!"),
    "closing": ("I hope this helps!", "You can always ask me more!", "Have a very good day!"),
    "rude": ("What a stupid thing to ask.", "Even a child knows this.", "Stop wasting my time."),
    "filler": (
        "It rained a lot last week.",
        "My uncle has two cats.",
        "I had soup for lunch.",
        "Time goes by so fast.",
        "My friend sings all day.",
    ),
    "vague": ("It depends on many things.", "There are many ways.", "You will find out."),
}

# What one of each is worth to the judge. Every weight is a multiple of 1/2, so scores are exact and ties are ties.
WEIGHTS = {
    "steps": 0.5,  # a step of the topic, in its place among the others
    "opening": 1.0,  # a courtesy as the first sentence
    "closing": 1.0,  # a courtesy as the last sentence
    "rude": -1.0,
    "filler": -0.5,  # rambling
    "vague": -0.5,  # says that it depends
    "foreign": -1.0,  # a step of another topic
    "garbled": -1.0,  # not a sentence of this world, or one that breaks off
    "repeated": -1.0,  # said before in this answer; comes on top of what the sentence itself costs
    "misplaced": -1.0,  # a courtesy anywhere else, a second one therefore too
    "disordered": -0.5,  # a step of the topic, but before or after its place
}

# Rows for each of the 360 train and 120 test prompts. Together the files stay under 4 MB.
DEMONSTRATIONS_PER_PROMPT = {"train": 8, "test": 2}
PAIRS_PER_PROMPT = {"train": 25, "test": 10}

# How somebody answers; `Style` in make_data.py says what the probabilities are of. The demonstrations, and the
# answers of a model that imitates them: half of those in the pairs.
HUMAN = {
    "opening": {"opening": 0.32, "rude": 0.16, None: 0.52},
    "closing": {"closing": 0.32, "rude": 0.10, None: 0.58},
    "steps": {4: 0.36, 3: 0.22, 2: 0.20, 1: 0.12, 0: 0.10},
    "fillers": {0: 0.36, 1: 0.40, 2: 0.24},
}
# The other half: what the policy will be like when it has learned something. A reward model that
# has seen only the beginning of the road does not know the rest of it.
BETTER = {
    "opening": {"opening": 0.60, "rude": 0.03, None: 0.37},
    "closing": {"closing": 0.60, "rude": 0.03, None: 0.37},
    "steps": {4: 0.55, 3: 0.25, 2: 0.12, 1: 0.05, 0: 0.03},
    "fillers": {0: 0.70, 1: 0.22, 2: 0.08},
}

# An answer in a pair has an error of a sampled model with this probability. A reward model that has
# seen only clean answers rewards garbled ones, and PPO finds them.
ERROR = 0.08
ERRORS = {  # how often each is made, if one is; the functions of these names are in make_data.py
    "splice": 0.34,
    "foreign_step": 0.26,
    "garble": 0.16,
    "cut_short": 0.08,
    "repeat": 0.07,
    "off_topic": 0.06,
    "stuff_courtesy": 0.03,
}
# This share of the pairs are an answer and the same with one thing changed: an error or an edit.
# They say what the difference is worth, where two independent answers differ in everything.
CLOSE_PAIRS = 0.5
CLOSE_PAIR_BY_ERROR = 0.15
# Sharpness of the labels: P(a preferred to b) = sigmoid(SHARPNESS * (gold(a) - gold(b))).
SHARPNESS = 2.0
