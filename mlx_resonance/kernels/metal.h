// What body.h and rotary.h need of Metal.
#define DEVICE_FUNCTION inline
#define DEVICE_MEMORY device
#define GRID_POSITION(attribute) attribute
#define FLOAT_OF_BITS(bits) as_type<float>(bits)
