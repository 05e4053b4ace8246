# Takes apt.h apart, so that several test programs share one compiled implementation although they call private functions:
#
#   awk -v part=object -f tests/split.awk apt.h      the whole header, its private functions no longer static: compile it once
#   awk -v part=view   -f tests/split.awk apt.h      the same with declarations in place of those functions: include it instead
#
# It relies on the shape that the header has everywhere: a function's braces stand alone at the start of a line and nothing
# else's do. Types, macros, constant tables and inline functions stay in both. What goes wrong here does not compile or link.

BEGIN {
    if (part == "view") print "#pragma GCC system_header"       # a program does not use all of its tables
    if (part == "object" || part == "view") print "#define APT_IMPLEMENTATION"
    else { print "split.awk: part=object or part=view" > "/dev/stderr"; exit 1 }
    print "#line 1 \"apt.h\""                    # so that messages name the place in the header
}

/^#define APT_IMPLEMENTED/ { implementation = 1 }

# The view needs no vector kernels: they are reached through their tables. Behind them stands the same nest of #if as before.
part == "view" && implementation && /^#if defined\(APTI_X86\) \|\| defined\(APTI_NEON\)/ { template = 1 }
template {
    print ""
    if (/^#undef APTI_INTERRUPTED/) last = 1
    if (last && /^#ifndef APT_ONLY_CORE/) template = 0
    next
}

skipping { print ""; if (/^}/) skipping = 0; next }

# What starts like a function is held back until it is clear what it is: {, a line that ends in ; or anything else.
implementation && held == "" && /^((APTI_UNUSED|APTI_NOINLINE) )?static [^=]*\(/ { held = $0; private = 1; settle(); next }
implementation && held == "" && /^APT_API [^=]*\(/ { held = $0; private = 0; settle(); next }
held != "" && /^[{]$/ {
    if (part == "object") printf "%s\n{\n", exported(held)
    else { printf "%s\n\n", private ? exported(held) ";" : blank(held); skipping = 1 }
    held = ""
    next
}
held != "" { held = held "\n" $0; settle(); next }
{ print }

function settle() {
    if (held ~ /;$/) { print private ? exported(held) : held; held = "" }
    else if (held ~ /[{}]$/) { print held; held = "" }
}

function exported(text) {                        # APTI_NOINLINE stays: results may hang on it
    sub(/^APTI_UNUSED /, "", text)
    sub(/static /, "", text)
    return text
}

function blank(text) {
    gsub(/[^\n]/, "", text)
    return text
}
