/* place.h - a folder of its own for each test of the example headers that writes files, and a check of messages; on top of
   apt_test.h and ex_base.h. */
#ifndef APT_TEST_PLACE_H
#define APT_TEST_PLACE_H

static inline void says(const ex_error *error, const char *needle)
{
    if (strstr(error->text, needle) == NULL) fail_msg("the message is \"%s\", expected \"%s\" in it", error->text, needle);
}

/* ---- a folder for files ---- */

typedef struct place { char dir[512], path[640]; } place;

static inline int place_setup(void **state)
{
    place *p = (place *)calloc(1, sizeof *p);
    assert_non_null(p);
    test_dir(p->dir, sizeof p->dir);
    *state = p;
    return 0;
}

static inline int place_teardown(void **state)
{
    place *p = (place *)*state;
    test_remove(p->dir);
    free(p);
    return 0;
}

#endif /* APT_TEST_PLACE_H */
