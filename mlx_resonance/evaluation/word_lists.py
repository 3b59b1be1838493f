"""Common English words, none of which is part of another, for RULER's keys and lists; RULER itself uses wonderwords."""

NOUNS = """
acorn album anchor angel animal ankle answer antler apple apron arena armor artist atlas attic author avenue badge
bakery ballad balloon bamboo banana banjo banner barber barley barn barrel basin basket beach beacon bean beard beetle
bell bench berry bishop blanket blossom boat bonnet border bottle boulder bowl bracelet branch brass bread breeze
brick bridge bronze brook broom brush bucket buffalo butter button cabinet cable cactus camel camera candle cannon
canvas canyon captain carpet carrot cartoon castle cattle cavern ceiling cellar cement chain chair chalk chapel
chapter cheese cherry chess chimney choir cider cinema circle circus citizen clay clerk cliff clock cloth clover coach
coast coffee coin collar comet compass copper coral corner cottage cotton cousin cradle crayon creek crown crystal
cupboard curtain cushion dagger dairy dancer desert diamond dinner doctor dolphin donkey dragon drawer driver drum
eagle easel elbow engine envelope estuary fabric factory falcon farmer feather fence fern ferry fiddle field finger
flag flame flower flute forest fortress fossil fountain fox frost fruit funnel galaxy garden garlic gate ghost giant
ginger giraffe glacier glass globe glove goblet gravel grove guitar hamlet hammer harbor harvest hawk hazel helmet
heron hill hinge honey horizon hostel hotel hunter iceberg island ivory jacket jaguar jar jewel jungle kettle kitchen
kitten ladder lagoon lake lantern laundry lawyer leather lemon letter library lighthouse lily linen lizard locket
lumber magnet mango mantle maple marble market meadow medal melon mermaid meteor mill miner mirror monkey monument
mountain museum mushroom napkin needle nephew notebook oasis ocean olive onion opera orange orchard orchid organ otter
oven oyster paddle palace panther paper parade parrot pasture pavement pebble pelican pencil pepper piano pigeon
pillow pilot pine pirate planet plaza plum pocket poem potato powder prairie prince puddle pumpkin puppet pyramid
quarry quilt rabbit radio raft railway rainbow raven ribbon rice robin rocket rope rose saddle sailor salad salmon
sandal satellite scarf school sculptor seed shadow shell shepherd shore silver singer sister sparrow spider spoon
spruce squirrel stable stadium staircase statue stone storm stove street summit sunset swan tailor teacher temple
theater thimble thunder tiger timber tower trumpet tulip tunnel turtle umbrella valley vapor velvet village violin
volcano wagon walnut walrus waterfall weaver whale wheat whistle willow window winter wizard wolf workshop yacht zebra
""".split()
ADJECTIVES = """
absent acid active alert amber ample ancient angry arctic awake bald basic bitter blind bold brave brief bright brisk
broad broken busy calm careful careless cautious central cheap cheerful civil clean clear clever close cloudy clumsy
coarse cold common complex cool costly crisp crooked cruel curious curly damp dark deaf deep dense direct dizzy double
drowsy dull dusty eager early easy elastic elegant empty equal exact exotic faint fair faithful famous fancy fast
fierce firm flat fluffy fond foolish formal fragile frank free fresh friendly frozen full funny furry gentle genuine
glad gloomy golden graceful grand grateful gray great greedy green handsome handy happy harsh hasty heavy helpful
hidden hollow honest huge humble humid hungry idle jolly keen kind large late lazy little lively local lonely loose
lovely loyal lucky mellow merry mild modern modest moist muddy mute narrow nasty neat noble noisy odd open orderly
oval pale patient polite poor proud pure purple quaint quick quiet rapid rare ready rich rigid ripe rough round royal
rude rusty safe salty scarce secret selfish serene shallow sharp shiny short shy silent silky simple sincere sleepy
slender slim slow smooth snowy sober soft solemn solid sour spare spicy square stale steady steep sticky stiff strange
strict strong stubborn sturdy subtle sudden sunny superb sweet swift tall tame tangy tender thick thin thirsty tidy
tight tiny tired tough tranquil true ugly urban urgent vague vain valid vast violet vivid warm weak wealthy weary
weird wet wide wild wise witty wooden wrong yellow young zealous
""".split()
VERBS = """
accept admire admit advise agree announce appear argue arrange arrive assist avoid balance begin believe belong blink
boil borrow bounce breathe bring build burn bury carry carve chase choose climb collect combine compare complain cook
copy cough count crawl create cross cure decide deliver deny describe destroy discover divide dream drift educate
enjoy enter escape examine explain explore fetch float follow forget forgive gather glow grab greet grow guess hang
hesitate hurry imagine improve include inform invite join juggle kneel knit knock laugh launch learn listen melt mend
notice obey observe offer paint pause perform plant please point polish prefer prepare promise protect pull push reach
realize receive recognize reduce remain remember remind repair repeat rescue return reveal scatter scrub search
separate shiver skate smile sneeze solve stretch suggest surprise swim tempt thank travel tumble unite vanish visit
wander whisper wonder worry wrestle write yawn
""".split()
