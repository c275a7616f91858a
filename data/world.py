"""The world of the shipped task: what can be asked, and every sentence that an answer can hold.

Constants only. `make_data.py` composes demonstrations and preference pairs from them, `judge.py`
recognises them again. The words are few and plain, so that a tokenizer of 1,024 entries spells
most of them in one token and a model of a million parameters learns the language in minutes.
"""

# Each topic is answered in four steps, in this order. No step serves two topics.
TASKS = {  # "How do I ...?"
    "bake a cake": ("heat the oven", "mix flour and sugar", "pour the batter in a tin", "bake it for an hour"),
    "change a tire": ("loosen the wheel nuts", "lift the car off the ground", "swap the flat tire", "tighten the wheel nuts"),
    "make tea": ("boil fresh water", "put a bag in the cup", "pour water on the tea", "take the tea bag out"),
    "cook rice": ("rinse the rice", "add two cups of water", "cook the rice on low heat", "let the rice rest"),
    "plant a tree": ("dig a deep hole", "set the roots in the hole", "fill the hole with soil", "water the young tree"),
    "wash a car": ("rinse the mud off the car", "rub the car with soap", "rinse the soap off the car", "dry the car with a cloth"),
    "paint a wall": ("clean the wall", "tape the edges of the wall", "roll the paint on", "let the paint dry"),
    "write a letter": ("take a pen and paper", "greet your friend by name", "write down your news", "sign the letter"),
    "send a package": ("put it all in a box", "close the box with tape", "write the address on the box", "take the box to the post"),
    "build a fire": ("find dry wood", "stack the small sticks", "light the sticks", "add the big logs"),
    "set up a tent": ("find flat ground", "lay the tent out", "push the poles in", "tie the tent down"),
    "wash a dog": ("wet the dog with warm water", "rub soap into the fur", "rinse the fur", "dry the dog with a towel"),
    "plan a trip": ("choose a place to go", "buy the train tickets", "book a room", "pack a small bag"),
    "learn a song": ("listen to the song", "read the words of the song", "sing one line at a time", "sing the song by heart"),
    "save money": ("write down what you spend", "set a limit for the month", "cut what you do not need", "put the rest in the bank"),
    "fry an egg": ("melt butter in a pan", "break the egg into the pan", "wait until the egg is firm", "put salt on the egg"),
    "bake bread": ("mix flour and yeast", "knead the dough", "let the dough rise", "bake the dough until brown"),
    "make soup": ("cut the onions", "fry the onions", "boil the onions in water", "add salt to the soup"),
    "sew a button on": ("thread the needle", "hold the button in place", "push the needle through", "tie a knot in the thread"),
    "iron a shirt": ("heat the iron", "lay the shirt flat", "press the shirt with the iron", "hang the shirt up"),
    "hang a picture": ("mark a spot on the wall", "hammer a nail in", "hang the picture on the nail", "check that it is straight"),
    "grow tomatoes": ("put the seeds in a pot", "keep the pot in the sun", "water the pot each day", "pick the red tomatoes"),
    "catch a fish": ("put a worm on the hook", "throw the line out", "wait for the fish to bite", "pull the fish in"),
    "play chess": ("set the pieces up", "move a pawn", "guard your king", "trap the other king"),
    "take a photo": ("clean the lens", "point the camera", "hold the camera still", "press the camera button"),
    "treat a cut": ("wash the cut", "press on the cut", "wait until the blood stops", "cover the cut with tape"),
    "find a job": ("look at the job ads", "write down your skills", "send your letter to the boss", "talk with the boss"),
    "save a file": ("open the file menu", "choose a folder", "type a name for the file", "click the save button"),
    "change a light bulb": ("turn the power off", "take the old bulb out", "screw the new bulb in", "turn the power on"),
    "wrap a gift": ("lay the gift on paper", "fold the paper over the gift", "tape the paper down", "tie a ribbon on top"),
    "build a snowman": ("roll a big ball of snow", "put a small ball on top", "add a carrot nose", "put a hat on the snowman"),
    "borrow a book": ("get a library card", "look for the book", "show the library card", "bring the book back"),
}  # fmt: skip
EXPLANATIONS = {  # "Can you explain ...?"
    "photosynthesis": ("roots drink from the soil", "leaves catch the sunlight", "sunlight splits the water", "the leaves make sugar"),
    "the water cycle": ("the sun warms the sea", "water rises into the air", "clouds form in the cold", "rain falls on the land"),
    "digestion": ("teeth break the food", "the stomach melts the food", "the gut takes the food in", "the rest leaves the body"),
    "breathing": ("the chest pulls air in", "air fills the lungs", "the blood takes oxygen", "the chest pushes air out"),
    "a volcano": ("rock melts deep down", "the hot rock rises", "gas pushes on the rock", "the lava breaks out"),
    "an earthquake": ("two plates push together", "the plates bend", "one of the plates slips", "the ground shakes"),
    "lightning": ("ice rubs in a cloud", "the cloud fills with charge", "a spark jumps down", "the hot air makes thunder"),
    "a rainbow": ("light falls on the rain", "each drop bends the light", "the light splits in colors", "the colors form a bow"),
    "an eclipse": ("the moon meets the sun", "its shadow falls on us", "the day turns dark", "the moon moves on"),
    "a steam engine": ("coal heats the water", "the water turns to steam", "steam pushes the piston", "the piston turns the wheel"),
    "a battery": ("acid eats the metal", "the metal gives charge", "charge runs through the wire", "the wire lights the bulb"),
    "a vaccine": ("a weak germ enters the body", "the body learns its shape", "the body makes guards", "the guards stop the germ"),
    "a fridge": ("a pump presses the gas", "the gas gives heat off", "the cold gas runs inside", "it takes heat from the food"),
    "evolution": ("parents pass genes on", "some genes change", "the fit ones live long", "their young fill the land"),
    "an election": ("leaders make their plans", "people cast their votes", "the votes are counted", "the winner leads the land"),
    "hearing": ("sound enters the ear", "the ear drum shakes", "small bones pass the sound on", "a nerve tells the brain"),
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


def split_prompts():
    """{"train": {prompt: topic}, "test": {prompt: topic}}: every topic in its twelve phrasings.

    A quarter of the combinations is held out, another quarter for each topic in turn: a model has
    met every topic and every phrasing of the test prompts, but never the two together.
    """
    prompts = {"train": {}, "test": {}}
    for i, topic in enumerate(TOPICS):
        for j, phrasing in enumerate(TASK_PHRASINGS if topic in TASKS else EXPLANATION_PHRASINGS):
            prompts["test" if j % 4 == i % 4 else "train"][phrasing.format(topic)] = topic
    return prompts
